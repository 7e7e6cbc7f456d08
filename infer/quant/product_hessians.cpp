#include "infer/quant/product_hessians.h"

#include <cstddef>
#include <numeric>
#include <vector>

#include "infer/pieces.h"
#include "src/autograd/context.h"

namespace fathom {

namespace {

// What fp32 sums by itself: then double goes on. That is 64 batches of calibration_batches(), each added to
// the sum as a whole, so the sum is rounded 64 times.
constexpr std::int64_t kTokensOnDevice = 1 << 18;

}  // namespace

ProductObserver ProductHessians::observer() {
  const auto reads =
      device_ != nullptr ? ProductObserver::Reads::DeviceWherePossible : ProductObserver::Reads::Host;
  const auto see = [this](const ProductInput& input) {
    if (input.on_device) {
      add_on_device(input);
      return;
    }
    const auto at = hessians_.try_emplace({input.parameter, input.expert}, input.columns).first;
    at->second.add(input.x, input.gates);
  };
  return {see, reads};
}

// x^T x is the gradient of a matrix whose outputs' gradient is x. Rows of fp32 are rounded to bf16 for it, as
// the served model has them on a GPU, and summed in fp32: that is faster (docs/log.md).
void ProductHessians::add_on_device(const ProductInput& input) {
  Context& c = *device_;
  const std::int64_t n = input.columns, rows = input.on_device.size / n;
  ConstView x = input.on_device;
  Tensor rounded;
  if (x.dtype == DType::F32 && !c.backend().is_cpu()) {
    rounded = c.empty({rows, n}, DType::BF16);
    c.backend().cast(rounded, x);
    x = rounded;
  }
  DeviceSum& at = sums_[{input.parameter, input.expert}];
  if (at.tokens == 0) at.sum = c.zeros({n, n}, c.stat_dtype());
  c.backend().linear_backward_weight_accumulate(at.sum, x, x, {.rows = rows, .in = n, .out = n});
  at.tokens += rows;
  if (at.tokens >= kTokensOnDevice) collect();
}

void ProductHessians::collect() {
  for (auto& [key, of] : sums_) {
    const std::int64_t n = of.sum.dim(0);
    Hessian& all = hessians_.try_emplace(key, n).first->second;
    if (of.sum.dtype() == DType::F64) {
      all.merge(Hessian(n, to_doubles(device_->backend(), of.sum), of.tokens));
    } else {
      all.add_sum(to_floats(device_->backend(), of.sum), of.tokens);
    }
  }
  sums_.clear();
}

double ProductHessians::relative_loss(std::span<const float> w, const QuantizedMatrix& q,
                                      const Hessian& h) const {
  if (device_ == nullptr || device_->backend().is_cpu()) return fathom::relative_loss(w, q, h);
  Context& c = *device_;
  check(q);
  const std::int64_t n = q.columns, rows = q.rows;
  std::vector<float> hessian(static_cast<std::size_t>(n * n)), xs(static_cast<std::size_t>(2 * rows * n));
  for_pieces(n, 16, [&](auto begin, auto end) {
    for (auto i = begin; i < end; ++i) {
      for (std::int64_t j = 0; j < n; ++j)
        hessian[static_cast<std::size_t>(i * n + j)] = static_cast<float>(h.at(i, j));
    }
  });
  // W's rows, then (W - Q)'s.
  for_pieces(rows, 16, [&](auto begin, auto end) {
    for (auto i = static_cast<std::size_t>(begin * n); i < static_cast<std::size_t>(end * n); ++i) {
      const double scale = q.scales[i / static_cast<std::size_t>(q.group)];
      xs[i] = w[i];
      xs[static_cast<std::size_t>(rows * n) + i] =
          static_cast<float>(static_cast<double>(w[i]) - scale * q.codes[i]);
    }
  });
  const Tensor x = c.empty({2 * rows, n}, DType::F32), y = c.empty({2 * rows, n}, DType::F32),
               of = c.empty({n, n}, DType::F32);
  from_host(c.backend(), x, xs);
  from_host(c.backend(), of, hessian);
  c.backend().linear_forward(y, x, of, {.rows = 2 * rows, .in = n, .out = n});
  const std::vector<float> ys = to_floats(c.backend(), y);
  std::vector<double> losses(static_cast<std::size_t>(2 * rows));
  for_pieces(2 * rows, 16, [&](auto begin, auto end) {
    for (auto r = begin; r < end; ++r) {
      for (auto i = static_cast<std::size_t>(r * n); i < static_cast<std::size_t>((r + 1) * n); ++i)
        losses[static_cast<std::size_t>(r)] += static_cast<double>(xs[i]) * static_cast<double>(ys[i]);
    }
  });
  const auto middle = losses.begin() + rows;
  const double all = std::accumulate(losses.begin(), middle, 0.0);
  return all > 0 ? std::accumulate(middle, losses.end(), 0.0) / all : 0;
}

const Hessian* ProductHessians::find(const std::string& parameter, std::int64_t expert) const {
  const auto found = hessians_.find({parameter, expert});
  return found == hessians_.end() ? nullptr : &found->second;
}

std::int64_t ProductHessians::tokens(const std::string& parameter, std::int64_t expert) const {
  const Hessian* h = find(parameter, expert);
  return h != nullptr ? h->tokens() : 0;
}

}  // namespace fathom
