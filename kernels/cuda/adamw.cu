// AdamW (Loshchilov & Hutter 2019), in PyTorch's arrangement: the decay first, then
// p -= lr/(1 - beta1^t) * m / (sqrt(v)/sqrt(1 - beta2^t) + eps).
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/vector.cuh"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;

struct Rates {
  float beta1, beta2, rest1, rest2, eps;
  double weight_decay;
};

struct Update {
  float keep, step_size, root_bias2, factor;
};

/// The step's part of the formula, each operation rounded as the host would.
__device__ Update update_of(const UpdateNumbers& now, const Rates& r) {
  return {static_cast<float>(__dsub_rn(1.0, __dmul_rn(now.lr, r.weight_decay))),
          static_cast<float>(__ddiv_rn(now.lr, now.bias1)), static_cast<float>(now.root_bias2),
          static_cast<float>(now.gradient_scale)};
}

__device__ __forceinline__ void update(float& master, float& m, float& v, float gradient, const Rates& r,
                                       const Update& u) {
  const float g = gradient * u.factor;
  m = m * r.beta1 + g * r.rest1;
  v = v * r.beta2 + g * g * r.rest2;
  master = master * u.keep - u.step_size * m / (sqrtf(v) / u.root_bias2 + r.eps);
}

/// Reads master, m, v and gradient, writes master, m, v and working: 28 bytes an element, and the working
/// copy's. The first thread reads the step's numbers, while the loads of the others are under way.
template <typename W, int kN>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(float* master, W* working, float* m, float* v, const float* gradient, std::int64_t packs,
                 const UpdateNumbers* now, Rates r) {
  __shared__ Update shared;
  __shared__ bool applied;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  using P = Pack<float, kN>;
  P p, first, second, g;
  if (i < packs) {
    p = P::load(master + i * kN);
    first = P::load(m + i * kN);
    second = P::load(v + i * kN);
    g = P::load(gradient + i * kN);
  }
  if (threadIdx.x == 0) {
    shared = update_of(*now, r);
    applied = now->applied != 0.0;
  }
  __syncthreads();
  if (i >= packs || !applied) return;
  const Update u = shared;
#pragma unroll
  for (int e = 0; e < kN; ++e) update(p.v[e], first.v[e], second.v[e], g.v[e], r, u);
  p.store(master + i * kN);
  first.store(m + i * kN);
  second.store(v + i * kN);
  if (working == nullptr) return;
  Pack<W, kN> copy;
#pragma unroll
  for (int e = 0; e < kN; ++e) copy.v[e] = p.v[e];
  copy.store(working + i * kN);
}

}  // namespace

void CudaBackend::adamw(View master, View working, View m, View v, ConstView gradient, ConstView numbers,
                        const AdamWParams& p) {
  const char* op = "adamw";
  const std::int64_t n = master.size;
  const Rates r{static_cast<float>(p.beta1),       static_cast<float>(p.beta2),
                static_cast<float>(1.0 - p.beta1), static_cast<float>(1.0 - p.beta2),
                static_cast<float>(p.eps),         p.weight_decay};
  float* w = output<float>(op, "master", master, n);
  float* first = output<float>(op, "m", m, n);
  float* second = output<float>(op, "v", v, n);
  const float* g = input<float>(op, "gradient", gradient, n);
  input<double>(op, "numbers", numbers, kUpdateNumbers);
  const auto* now = static_cast<const UpdateNumbers*>(numbers.data);
  for_compute_type(op, working ? working.dtype : DType::F32, [&](auto zero) {
    using W = decltype(zero);
    W* copy = optional_output<W>(op, "working", working, n);
    if (n == 0) return;
    constexpr int kN = kPack<float>;
    const bool packed = packs<float>(w, n) && packs<float>(first, n) && packs<float>(second, n) &&
                        packs<float>(g, n) && reinterpret_cast<std::uintptr_t>(copy) % (kN * sizeof(W)) == 0;
    if (packed) {
      adamw_kernel<W, kN>
          <<<blocks_for(n / kN, kThreads), kThreads, 0, stream_>>>(w, copy, first, second, g, n / kN, now, r);
    } else {
      adamw_kernel<W, 1>
          <<<blocks_for(n, kThreads), kThreads, 0, stream_>>>(w, copy, first, second, g, n, now, r);
    }
    check_launch(op);
  });
}

}  // namespace fathom::cuda
