#include "train/scaling.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include <fmt/format.h>

#include "kernels/error.h"
#include "train/ranks.h"
#include "train/shards.h"

namespace fathom {

namespace {

constexpr double kReached = 0.8;  // of a nominal rate
constexpr double kOfHost = 3e-6, kOfNetwork = 8e-6;

/// Seconds of a ring's reduce-scatter, or all-gather, of so many bytes in pieces.
double ring_seconds(double bytes, double pieces, int gpus, const Link& link) {
  const double others = gpus - 1;
  return others / gpus * bytes / link.bytes_per_second + others * pieces * link.latency;
}

}  // namespace

Link link_of(const std::string& text) {
  const Link known[] = {{"nvlink", kReached * 450e9, kOfHost},
                        {"pcie", kReached * 64e9, kOfHost},
                        {"infiniband", kReached * 50e9, kOfNetwork},
                        {"ethernet", kReached * 12.5e9, kOfNetwork}};
  for (const Link& link : known) {
    if (link.name == text) return link;
  }
  double rate = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), rate);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(rate) || rate <= 0) {
    throw UsageError(fmt::format("'{}' is no link between GPUs.", text),
                     "Expected nvlink, pcie, infiniband, ethernet, or the GB/s that one GPU's collectives "
                     "reach, such as 310.");
  }
  return {text + " GB/s", rate * 1e9, kOfNetwork};
}

ScaledStep scaled_step(const Config& config, const Cluster& cluster, int gpus) {
  const Config share = share_of(config, gpus);
  ScaledStep s;
  s.gpus = gpus;
  s.tokens = config.train.batch_tokens;
  s.compute = train_flops_per_step(share) / cluster.flops_per_second;
  s.memory = estimate_memory(share);
  if (gpus == 1) return s;
  const Link& link = gpus <= cluster.gpus_per_host                                        ? cluster.within
                     : cluster.between.bytes_per_second < cluster.within.bytes_per_second ? cluster.between
                                                                                          : cluster.within;
  const auto parameters = static_cast<double>(count_parameters(config).total);
  const bool sends_bf16 = config.train.reduction == "bf16";
  const double gradients = parameters * (sends_bf16 ? 2 : 4);
  // Vectors are fp32 everywhere; they are too few to count.
  const double weights = parameters * (config.train.precision == "bf16" ? 2 : 4);
  const double buckets = std::ceil(parameters / static_cast<double>(kBucketElements));
  s.reduce = ring_seconds(gradients, buckets, gpus, link);
  s.gather = ring_seconds(weights, buckets, gpus, link);
  const auto micro_batches =
      static_cast<double>(share.train.batch_tokens / share.train.seq_len / share.micro_batch_sequences());
  const double backward = s.compute / micro_batches * 2 / 3;
  s.hidden = std::min(backward, s.reduce * (1 - 1 / buckets));
  s.bytes_sent = (gradients + weights) * (gpus - 1) / gpus;
  s.memory.optimizer /= gpus;
  if (sends_bf16) s.memory.gradients *= 1.5;  // the arena in which they are sent
  return s;
}

}  // namespace fathom
