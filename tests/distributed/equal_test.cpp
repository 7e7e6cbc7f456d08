// Several ranks compute what one rank with the whole batch does, for every kind of routing: only the order of
// sums differs.
#include <algorithm>
#include <cmath>
#include <mutex>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "src/core/splitmix64.h"
#include "tests/distributed/kinds.h"
#include "tests/distributed/thread_ranks.h"
#include "train/step.h"

namespace fathom {
namespace {

using testing::all_kinds;
using testing::Kind;
using testing::run_as_ranks;

// Neighbours differ: two equal tokens at a sequence's beginning have equal streams, and which of them a
// router takes is then a matter of rounding.
std::int32_t token(std::int64_t at) {
  return static_cast<std::int32_t>(2 * (mix64(static_cast<std::uint64_t>(at)) % 30) +
                                   static_cast<std::uint64_t>(at % 2));
}

HostBatch text(const Config& config, std::int64_t first, std::int64_t count) {
  std::vector<std::int32_t> tokens, targets, documents;
  const std::int64_t seq = config.train.seq_len;
  for (std::int64_t at = first * seq; at < (first + count) * seq; ++at) {
    tokens.push_back(token(at));
    targets.push_back(token(at + 1));
    if (config.data.document_mask) documents.push_back(static_cast<std::int32_t>(at / 11));
  }
  return make_host_batch(count, seq, std::move(tokens), std::move(targets), documents);
}

// What a training of `config` computes, seen from rank 0.
struct Course {
  std::vector<double> gradients;  // of the first step
  std::vector<StepOutcome> steps;
  std::vector<double> masters;  // at the end
};

// Small buckets, which do not divide equally: each rank has several parts, of several sizes.
constexpr std::int64_t kSmallBucket = 1500;

Course train_as(const Config& config, DType dtype, std::int64_t steps, std::shared_ptr<Communicator> comm) {
  const auto ranks = std::make_shared<Ranks>(comm);
  const Config share = share_of(config, ranks->size());
  Context c(make_cpu_backend({}, 1), dtype);
  Transformer model(c, config.model, config.routing, true);
  model.initialise(c, 1);
  model.set_recompute(config.train.recompute);
  AdamW optimizer(c, config.train, Shards(model.parameters(), ranks->rank(), ranks->size(), kSmallBucket));
  const auto source = [&](std::int64_t first, std::int64_t count) { return text(config, first, count); };
  StepRunner stepper(c, model, optimizer, share, source, ranks);
  Course course;
  const std::int64_t sequences = config.train.batch_tokens / config.train.seq_len;
  for (std::int64_t step = 0; step < steps; ++step) {
    EXPECT_TRUE(stepper.launch({step, step * sequences, 1e-3, {}}));
    course.steps.push_back(stepper.read());
    EXPECT_TRUE(course.steps.back().applied);
    if (step > 0) continue;
    for (const Shards::Bucket& b : optimizer.shards().buckets()) {
      if (comm->alone()) break;
      const Tensor& all = model.parameters().gradients();
      comm->all_gather(all.rows(b.range.begin, b.range.begin + b.range.size), b.counts);
    }
    course.gradients = to_doubles(c.backend(), model.parameters().gradients());
  }
  course.masters = to_doubles(c.backend(), model.parameters().masters());
  return course;
}

Course train_with(int ranks, const Config& config, DType dtype, std::int64_t steps) {
  Course of_rank_0;
  run_as_ranks(ranks, [&](const std::shared_ptr<Communicator>& comm) {
    Course course = train_as(config, dtype, steps, comm);
    if (comm->rank() == 0) of_rank_0 = std::move(course);
  });
  return of_rank_0;
}

double largest(const std::vector<double>& values) {
  double most = 0;
  for (const double x : values) most = std::max(most, std::abs(x));
  return most;
}

double difference(const std::vector<double>& a, const std::vector<double>& b) {
  EXPECT_EQ(a.size(), b.size());
  double most = 0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    const double d = std::abs(a[i] - b[i]);
    if (!(d < INFINITY)) return INFINITY;
    most = std::max(most, d);
  }
  return most;
}

std::vector<double> losses_of(const StepOutcome& o) {
  return {o.loss, o.aux, o.predictor, o.balance, o.z, o.expert_aux, o.expert_predictor};
}

class Equal : public ::testing::TestWithParam<Kind> {
 protected:
  // The gradients and norms of the first step, and every loss of every step.
  static void expect_same_course(const Course& one, const Course& several, double gradients, double losses) {
    EXPECT_LT(difference(one.gradients, several.gradients), gradients * largest(one.gradients));
    ASSERT_EQ(one.steps.size(), several.steps.size());
    for (std::size_t i = 0; i < one.steps.size(); ++i) {
      const std::vector<double> a = losses_of(one.steps[i]), b = losses_of(several.steps[i]);
      for (std::size_t j = 0; j < a.size(); ++j)
        ASSERT_NEAR(a[j], b[j], losses * std::max(1.0, std::abs(a[j]))) << "number " << j << " of step " << i;
    }
    const AdamW::Norms &a = one.steps[0].norms, &b = several.steps[0].norms;
    EXPECT_NEAR(a.model, b.model, gradients * a.model);
    EXPECT_NEAR(a.predictor, b.predictor, gradients * std::max(1.0, a.predictor));
  }
  const Config& config() const { return GetParam().config; }
};
INSTANTIATE_TEST_SUITE_P(Kinds, Equal, ::testing::ValuesIn(all_kinds()),
                         [](const auto& kind) { return kind.param.name; });

TEST_P(Equal, TwoRanksComputeWhatOneDoes) {
  const Course one = train_with(1, config(), DType::F64, 100);
  EXPECT_GT(difference(one.masters, train_with(1, config(), DType::F64, 1).masters), 0.05) << "nothing moves";
  expect_same_course(one, train_with(2, config(), DType::F64, 100), 1e-12, 1e-9);
  const Course single = train_with(1, config(), DType::F32, 100);
  // Held against what replayed routing would be: no decision of these runs differs, or losses would by 1e-3.
  expect_same_course(single, train_with(2, config(), DType::F32, 100), 1e-5, 1e-4);
}

TEST_P(Equal, FourRanksComputeWhatOneDoesInMicroBatches) {
  Config c = config();
  c.train.micro_batch = 2;
  const Course one = train_with(1, config(), DType::F64, 30);
  expect_same_course(one, train_with(1, c, DType::F64, 30), 1e-12, 1e-9);
  expect_same_course(one, train_with(4, c, DType::F64, 30), 1e-12, 1e-9);
  c.train.micro_batch = 1;
  c.train.recompute = Recompute::Block;
  expect_same_course(one, train_with(4, c, DType::F64, 30), 1e-12, 1e-9);
}

TEST_P(Equal, DocumentsStayApart) {
  Config c = config();
  c.data.document_mask = true;
  const Course one = train_with(1, c, DType::F64, 5);
  expect_same_course(one, train_with(2, c, DType::F64, 5), 1e-12, 1e-9);
  EXPECT_GT(difference(one.gradients, train_with(1, config(), DType::F64, 1).gradients), 0);
}

TEST_P(Equal, TheSameRanksComputeTheSameBits) {
  const Course a = train_with(2, config(), DType::F32, 10), b = train_with(2, config(), DType::F32, 10);
  EXPECT_EQ(a.masters, b.masters);
  EXPECT_EQ(a.steps.back().loss, b.steps.back().loss);
}

// Statistics of all ranks' sequences: shares are those of one rank with the whole batch, and so are extremes.
TEST_P(Equal, StatisticsAreOfAllRanks) {
  const StepOutcome one = train_with(1, config(), DType::F64, 1).steps[0];
  const StepOutcome two = train_with(2, config(), DType::F64, 1).steps[0];
  const auto same = [](const std::vector<RouterSummary>& a, const std::vector<RouterSummary>& b) {
    ASSERT_EQ(a.size(), b.size());
    for (std::size_t i = 0; i < a.size(); ++i) {
      EXPECT_NEAR(a[i].mean, b[i].mean, 1e-12);
      EXPECT_NEAR(a[i].min, b[i].min, 1e-12);
      EXPECT_NEAR(a[i].max, b[i].max, 1e-12);
      EXPECT_NEAR(a[i].above_half, b[i].above_half, 1e-12);
      EXPECT_NEAR(a[i].members, b[i].members, 1e-12);
      EXPECT_NEAR(a[i].true_positives, b[i].true_positives, 1e-12);
      EXPECT_NEAR(a[i].positives, b[i].positives, 1e-12);
    }
  };
  same(one.routing, two.routing);
  same(one.expert_routing, two.expert_routing);
  ASSERT_EQ(one.experts.size(), two.experts.size());
  for (std::size_t i = 0; i < one.experts.size(); ++i) {
    const ExpertStats &a = one.experts[i], &b = two.experts[i];
    EXPECT_NEAR(a.uncovered, b.uncovered, 1e-12);
    EXPECT_NEAR(a.per_token, b.per_token, 1e-12);
    EXPECT_NEAR(a.dropped, b.dropped, 1e-12);
    EXPECT_NEAR(a.noop_affinity, b.noop_affinity, 1e-12);
    EXPECT_NEAR(a.entropy, b.entropy, 1e-12);
    EXPECT_GE(b.load_max, a.load_max - 1e-12);  // of half as many tokens
    EXPECT_LE(b.load_min, a.load_min + 1e-12);
  }
}

// What a rank sends is rounded, and the sum once more: each by one part in 256 at the most.
TEST_P(Equal, GradientsAreSentAsBf16) {
  Config c = config();
  const Course one = train_with(1, c, DType::F32, 20);
  c.train.reduction = "bf16";
  const Course two = train_with(2, c, DType::F32, 20);
  const double apart = difference(one.gradients, two.gradients);
  EXPECT_GT(apart, 0);
  EXPECT_LT(apart, largest(one.gradients) * 2 / 256);
  EXPECT_NEAR(one.steps.back().loss, two.steps.back().loss, 0.02 * one.steps.back().loss);
  // Nobody sends anything.
  EXPECT_EQ(train_with(1, c, DType::F32, 20).masters, one.masters);
}

// A step that one rank alone cannot be judged by: its number that is not finite is everybody's.
TEST(EqualRanks, RefuseTheSameSteps) {
  Config config = all_kinds()[0].config;
  config.train.grad_clip = 0.05;  // every step is clipped, by the norm over all parts
  const auto run = [&](int n) { return train_with(n, config, DType::F64, 20); };
  const Course one = run(1);
  EXPECT_GT(one.steps[0].norms.model, 0.05);
  EXPECT_LT(difference(one.masters, run(2).masters), 1e-9);
  run_as_ranks(2, [&](const std::shared_ptr<Communicator>& comm) {
    const auto ranks = std::make_shared<Ranks>(comm);
    const Config share = share_of(config, 2);
    Context c(make_cpu_backend({}, 1), DType::F32);
    Transformer model(c, config.model, config.routing, true);
    model.initialise(c, 1);
    AdamW optimizer(c, config.train, Shards(model.parameters(), comm->rank(), 2));
    StepRunner stepper(
        c, model, optimizer, share, [&](std::int64_t f, std::int64_t n) { return text(config, f, n); },
        ranks);
    const Tensor& norm = model.parameters().get("model.norm.weight");
    std::vector<float> values = to_floats(c.backend(), norm);
    if (comm->rank() == 1) values[15] = INFINITY;  // as if its memory failed
    from_host(c.backend(), norm, values);
    const std::vector<double> before = to_doubles(c.backend(), optimizer.state().m);
    ASSERT_TRUE(stepper.launch({0, 0, 1e-3, {}}));
    EXPECT_FALSE(stepper.read().applied);
    EXPECT_EQ(to_doubles(c.backend(), optimizer.state().m), before);
    // What its owner has of a parameter is everybody's behind the step.
    EXPECT_NE(stepper.trace(0, 0).find("model.norm.weight"), std::string::npos);
  });
}

}  // namespace
}  // namespace fathom
