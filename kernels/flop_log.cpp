#include "kernels/flop_log.h"

namespace fathom {

void FlopLog::gemm(std::int64_t m, std::int64_t n, std::int64_t k) {
  add(item_, 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k));
}

void FlopLog::add(const char* item, double flops) {
  if (enabled) flops_[item] += flops;
}

void FlopLog::clear() { flops_.clear(); }

double FlopLog::total() const {
  double sum = 0;
  for (const auto& [name, flops] : flops_) sum += flops;
  return sum;
}

}  // namespace fathom
