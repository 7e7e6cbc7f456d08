#include "infer/quant/key_means.h"

#include <fmt/format.h>

#include "kernels/error.h"

namespace fathom {

KeyMeans::KeyMeans(const ModelConfig& m)
    : first_(static_cast<std::size_t>(m.heads * m.head_dim())),
      row_(static_cast<std::size_t>((m.heads + 2 * m.kv_heads) * m.head_dim())),
      sums_(static_cast<std::size_t>(m.kv_heads * m.head_dim())) {}

void KeyMeans::add(Context& c, const Tensor& qkv) {
  const std::vector<float> values = to_floats(c.backend(), qkv);
  if (values.size() % row_ != 0)
    throw InternalError(fmt::format("[key_means] {} elements are no rows of {}", values.size(), row_));
  for (std::size_t row = 0; row < values.size(); row += row_) {
    const float* keys = values.data() + row + first_;
    for (std::size_t e = 0; e < sums_.size(); ++e) sums_[e] += static_cast<double>(keys[e]);
  }
  rows_ += static_cast<std::int64_t>(values.size() / row_);
}

std::vector<float> KeyMeans::means() const {
  std::vector<float> means(sums_.size());
  for (std::size_t e = 0; e < means.size() && rows_ > 0; ++e)
    means[e] = static_cast<float>(sums_[e] / static_cast<double>(rows_));
  return means;
}

}  // namespace fathom
