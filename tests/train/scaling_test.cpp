// Trainings by several GPUs, foretold.
#include "train/scaling.h"

#include <gtest/gtest.h>

#include "kernels/error.h"
#include "src/config/resolve.h"

namespace fathom {
namespace {

Config config_of() {
  Config c;
  c.model.vocab_size = 1024;
  c.model.width = 1024;
  c.model.depth = 8;
  c.model.heads = 8;
  c.model.ffn_hidden = 2816;
  c.train.seq_len = 128;
  c.train.batch_tokens = 128 * 64;
  c.train.micro_batch = 1;
  c.train.steps = 10;
  c.train.target_flops.reset();
  c.train.precision = "bf16";
  return resolve(c, {});
}

Cluster cluster_of() { return {link_of("100"), link_of("10"), 8, 1e14}; }

TEST(Scaling, OneGpuComputesAndSendsNothing) {
  const ScaledStep s = scaled_step(config_of(), cluster_of(), 1);
  EXPECT_DOUBLE_EQ(s.step(), train_flops_per_step(config_of()) / 1e14);
  EXPECT_EQ(s.bytes_sent, 0);
  EXPECT_EQ(s.efficiency(), 1);
}

TEST(Scaling, ARingMovesAllButOneShareOfWhatThereIs) {
  Cluster c = cluster_of();
  c.within.latency = c.between.latency = 0;
  const auto parameters = static_cast<double>(count_parameters(config_of()).total);
  for (const int n : {2, 4, 8}) {
    const ScaledStep s = scaled_step(config_of(), c, n);
    EXPECT_NEAR(s.bytes_sent, 6 * parameters * (n - 1) / n, 1);
    EXPECT_NEAR(s.reduce + s.gather, s.bytes_sent / 100e9, 1e-12);
    EXPECT_NEAR(s.compute * n, scaled_step(config_of(), c, 1).compute, 1e-9);
    EXPECT_NEAR(s.memory.optimizer * n, scaled_step(config_of(), c, 1).memory.optimizer, 1);
  }
  // Beyond a host the network's rate counts.
  const ScaledStep wide = scaled_step(config_of(), c, 16);
  EXPECT_NEAR(wide.reduce + wide.gather, wide.bytes_sent / 10e9, 1e-12);
}

TEST(Scaling, WhatIsHiddenIsNoMoreThanBackwardOfAMicroBatchAndNotTheLastBucket) {
  Cluster c = cluster_of();
  const ScaledStep slow = scaled_step(config_of(), c, 64);  // one micro-batch each
  EXPECT_NEAR(slow.hidden, slow.compute * 2 / 3, 1e-12);
  const ScaledStep shared = scaled_step(config_of(), c, 16);  // four
  EXPECT_NEAR(shared.hidden, shared.compute / 4 * 2 / 3, 1e-12);
  c.between = c.within = {"fast", 1e15, 0};
  const ScaledStep fast = scaled_step(config_of(), c, 64);
  EXPECT_LT(fast.hidden, fast.reduce);
  EXPECT_GT(fast.hidden, 0.8 * fast.reduce);
  EXPECT_GT(fast.efficiency(), 0.99);
}

TEST(Scaling, Bf16HalvesWhatGradientsSend) {
  Config c = config_of();
  const ScaledStep whole = scaled_step(c, cluster_of(), 2);
  c.train.reduction = "bf16";
  const ScaledStep half = scaled_step(c, cluster_of(), 2);
  EXPECT_NEAR(half.bytes_sent / whole.bytes_sent, 4.0 / 6, 1e-12);
  EXPECT_DOUBLE_EQ(half.memory.gradients, 1.5 * whole.memory.gradients);
}

TEST(Scaling, RefusesLinksThatAreNone) {
  EXPECT_EQ(link_of("nvlink").name, "nvlink");
  for (const char* text : {"", "token-ring", "-3", "0", "nan", "12GB"})
    EXPECT_THROW(link_of(text), UsageError) << text;
  EXPECT_THROW(scaled_step(config_of(), cluster_of(), 3), UsageError);  // 64 sequences
}

}  // namespace
}  // namespace fathom
