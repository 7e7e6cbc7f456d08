// A count of the matrix work that a backend really launched, to hold the FLOP counter of src/flops against.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace fathom {

/// Multiply-adds count 2. Attention counts the (query, key) pairs at half of K^2, the convention of
/// docs/flops.md.
class FlopLog {
 public:
  /// What the launches that follow belong to: "mlp", "head", ... Items are kept by this name.
  void set_item(const char* item) { item_ = item; }
  const char* item() const { return item_; }

  void gemm(std::int64_t m, std::int64_t n, std::int64_t k) {
    if (enabled)
      flops_[item_] += 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  }
  void add(const char* item, double flops) {
    if (enabled) flops_[item] += flops;
  }
  void clear() { flops_.clear(); }
  const std::map<std::string, double>& items() const { return flops_; }
  double total() const {
    double sum = 0;
    for (const auto& [name, flops] : flops_) sum += flops;
    return sum;
  }

  bool enabled = false;

 private:
  const char* item_ = "other";
  std::map<std::string, double> flops_;
};

}  // namespace fathom
