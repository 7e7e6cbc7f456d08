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

  // Out of line, as the CPU backend's copies for AVX must not instantiate std::map.
  void gemm(std::int64_t m, std::int64_t n, std::int64_t k);
  void add(const char* item, double flops);
  void clear();
  const std::map<std::string, double>& items() const { return flops_; }
  double total() const;

  bool enabled = false;

 private:
  const char* item_ = "other";
  std::map<std::string, double> flops_;
};

}  // namespace fathom
