// Whether a step's update is made (step_rule.h), decided where the losses and the norms are, so that nobody
// waits for them: one warp looks for what is not finite, and one thread decides.
//
// Every operation in double is rounded by itself, as on the host, which decides again when it reads the
// report.
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"

namespace fathom::cuda {

namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffU;

__device__ bool not_finite(float x) { return (__float_as_uint(x) & 0x7f800000U) == 0x7f800000U; }

__device__ double clip(double grad_clip, double norm) {
  return grad_clip > 0.0 && norm > grad_clip ? __ddiv_rn(grad_clip, norm) : 1.0;
}

/// Reads parts * slots + kClipGroups floats.
__global__ void __launch_bounds__(kWarp)
    judge_step_kernel(UpdateNumbers* groups, LossMean* mean, float* applied, const float* losses,
                      const float* squares, StepRule rule) {
  const auto lane = static_cast<std::int64_t>(threadIdx.x);
  const std::int64_t count = rule.parts * rule.slots;
  bool broken = lane < kClipGroups && not_finite(squares[lane]);
  for (std::int64_t i = lane; i < count; i += kWarp) broken = broken || not_finite(losses[i]);
  broken = __any_sync(kAllLanes, broken) != 0;
  if (lane != 0) return;

  const double all = __dmul_rn(static_cast<double>(rule.rows), static_cast<double>(rule.parts));
  double loss = 0.0;
  for (std::int64_t part = 0; part < rule.parts; ++part) {
    loss = __dadd_rn(loss, __ddiv_rn(static_cast<double>(losses[part * rule.slots]), all));
  }
  LossMean average = *mean;
  const bool spike = rule.refuses_spikes && average.steps >= kSettledSteps &&
                     loss > __dmul_rn(rule.spike_factor, average.mean);
  const bool goes = average.halted == 0.0 && !broken && !spike;

  const double of_model =
      clip(rule.grad_clip,
           __dsqrt_rn(__dadd_rn(static_cast<double>(squares[0]), static_cast<double>(squares[1]))));
  const double of_predictor = clip(rule.grad_clip, __dsqrt_rn(static_cast<double>(squares[2])));
  for (std::int64_t g = 0; g < kClipGroups; ++g) {
    groups[g].gradient_scale = g + 1 < kClipGroups ? of_model : of_predictor;
    groups[g].applied = goes ? 1.0 : 0.0;
  }
  if (goes) {
    average.steps = __dadd_rn(average.steps, 1.0);
    const double plain = __ddiv_rn(1.0, average.steps);
    const double share = plain < kSlowestShare ? kSlowestShare : plain;
    average.mean = __dadd_rn(average.mean, __dmul_rn(share, __dsub_rn(loss, average.mean)));
  } else {
    average.halted = 1.0;
  }
  *mean = average;
  *applied = goes ? 1.0F : 0.0F;
}

}  // namespace

void CudaBackend::judge_step(View numbers, View mean, View applied, ConstView losses, ConstView squares,
                             const StepRule& rule) {
  const char* op = "judge_step";
  output<double>(op, "numbers", numbers, kClipGroups * kUpdateNumbers);
  output<double>(op, "mean", mean, kLossMeanNumbers);
  auto* verdict = output<float>(op, "applied", applied, 1);
  const auto* all_losses = input<float>(op, "losses", losses, rule.parts * rule.slots);
  const auto* sums = input<float>(op, "squares", squares, kClipGroups);
  judge_step_kernel<<<1, kWarp, 0, stream_>>>(static_cast<UpdateNumbers*>(numbers.data),
                                              static_cast<LossMean*>(mean.data), verdict, all_losses, sums,
                                              rule);
  check_launch(op);
}

}  // namespace fathom::cuda
