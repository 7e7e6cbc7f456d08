#include "infer/quant/outliers.h"

#include <algorithm>
#include <cmath>

namespace fathom {

std::vector<double> stream_outliers(Context& c, const Transformer& model, const SelectionRule& rule,
                                    std::span<const std::int32_t> tokens, std::int64_t seq) {
  const NoGrad no_grad(c);
  const auto width = static_cast<std::size_t>(model.config().width), length = static_cast<std::size_t>(seq);
  std::vector<double> sums(static_cast<std::size_t>(model.config().depth) + 1);
  std::int64_t seen = 0;
  for (std::size_t first = 0; first + length <= tokens.size(); first += length) {
    const std::vector<std::int32_t> ids(tokens.begin() + static_cast<std::ptrdiff_t>(first),
                                        tokens.begin() + static_cast<std::ptrdiff_t>(first + length));
    model.forward(c, make_batch(c, 1, seq, ids, {}), rule, [&](std::int64_t blocks, const Tensor& stream) {
      const std::vector<double> x = to_doubles(c.backend(), stream);
      for (std::size_t row = 0; row < x.size(); row += width) {
        double most = 0, squares = 0;
        for (std::size_t i = row; i < row + width; ++i) {
          most = std::max(most, std::abs(x[i]));
          squares += x[i] * x[i];
        }
        if (squares > 0)
          sums[static_cast<std::size_t>(blocks)] += most / std::sqrt(squares / static_cast<double>(width));
      }
    });
    seen += seq;
  }
  for (double& s : sums) s /= static_cast<double>(std::max<std::int64_t>(1, seen));
  return sums;
}

}  // namespace fathom
