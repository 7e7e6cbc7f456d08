// AdamW (Loshchilov & Hutter 2019), in PyTorch's arrangement: the decay first, then
// p -= lr/(1 - beta1^t) * m / (sqrt(v)/sqrt(1 - beta2^t) + eps).
#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/partials.h"
#include "kernels/cpu/isa/vector_math.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

template <typename T>
void update(T* master, T* working, T* m, T* v, const T* gradient, std::int64_t n, const UpdateNumbers& now,
            const AdamWParams& p) {
  if (now.applied == 0) return;
  const T beta1 = static_cast<T>(p.beta1), beta2 = static_cast<T>(p.beta2), eps = static_cast<T>(p.eps);
  const T rest1 = static_cast<T>(1.0 - p.beta1), rest2 = static_cast<T>(1.0 - p.beta2);
  const T keep = static_cast<T>(1.0 - now.lr * p.weight_decay);
  const T step_size = static_cast<T>(now.lr / now.bias1);
  const T root_bias2 = static_cast<T>(now.root_bias2);
  const T factor = static_cast<T>(now.gradient_scale);
  parallel_for(n, kGrain, [=](std::int64_t begin, std::int64_t end) {
#pragma omp simd
    for (std::int64_t i = begin; i < end; ++i) {
      const T g = gradient[i] * factor;
      const T first = m[i] * beta1 + g * rest1;
      const T second = v[i] * beta2 + g * g * rest2;
      m[i] = first;
      v[i] = second;
      master[i] = master[i] * keep - step_size * first / (vsqrt(second) / root_bias2 + eps);
    }
    if (working == nullptr) return;
#pragma omp simd
    for (std::int64_t i = begin; i < end; ++i) working[i] = master[i];
  });
}

}  // namespace

void CpuBackend::adamw(View master, View working, View m, View v, ConstView gradient, ConstView numbers,
                       const AdamWParams& p) {
  const char* op = "adamw";
  const std::int64_t n = master.size;
  input<double>(op, "numbers", numbers, kUpdateNumbers);
  const auto& now = *static_cast<const UpdateNumbers*>(numbers.data);
  for_compute_type(op, master.dtype, [&](auto zero) {
    using T = decltype(zero);
    update(output<T>(op, "master", master, n), optional_output<T>(op, "working", working, n),
           output<T>(op, "m", m, n), output<T>(op, "v", v, n), input<T>(op, "gradient", gradient, n), n, now,
           p);
  });
}

void CpuBackend::judge_step(View numbers, View mean, View applied, ConstView losses, ConstView squares,
                            const StepRule& rule) {
  judge_step_on_host(numbers, mean, applied, losses, squares, rule);
}

}  // namespace fathom::cpu::FATHOM_ISA
