// Losses that jump and numbers that are not finite: named by step, layer and op, and dealt with as the config
// says.
#include <cmath>
#include <limits>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/backend.h"
#include "src/model/checkpoint.h"
#include "tests/system/cli.h"
#include "train/optimizer.h"

namespace fathom {
namespace {

using testing::content;
using testing::expect_refusal;
using testing::Experiment;
using testing::fathom_command;
using ::testing::HasSubstr;
using testing::Outcome;

class Spikes : public ::testing::Test {
 protected:
  // The run's newest checkpoint with one weight replaced.
  void poison(const std::string& run, const std::string& parameter, float value) const {
    const std::string path = e.newest_checkpoint(run);
    Context c(make_cpu_backend({}, 1), DType::F32);
    const LoadedModel described = load_model(path, c);
    Transformer model(c, described.config.model, described.config.routing, true);
    AdamW optimizer(c, model.parameters(), described.config.train);
    const CheckpointMeta meta = load_checkpoint(path, c, model.parameters(), &optimizer.state());
    const Tensor& weight = model.parameters().get(parameter);
    std::vector<float> values = to_host<float>(c.backend(), weight);
    values.at(5) = value;
    from_host(c.backend(), weight, values);
    save_checkpoint(path, c, model.parameters(), optimizer.state(), meta);
  }
  std::vector<nlohmann::json> events(const std::string& run, const std::string& kind) const {
    std::vector<nlohmann::json> found;
    for (const auto& line : e.lines(run)) {
      if (line.value("event", "") == kind) found.push_back(line);
    }
    return found;
  }

  Experiment e;
  // Without evaluations in between, and stopped at step 20 of 40 by the horizon of a copy.
  const std::string half = "--set train.schedule=constant --set train.warmup=1 --set train.steps=20";
  const std::string whole = "--set train.schedule=constant --set train.warmup=1 --resume half";
};

TEST_F(Spikes, AWeightThatIsNotFiniteIsNamed) {
  e.trained("mod", "half", half);
  poison("half", "model.layers.2.mlp.down_proj.weight", std::nanf(""));
  const Outcome outcome = fathom_command(e, Experiment::train("mod", "run", whole));
  expect_refusal(outcome, 1, {"step 21", "model.layers.2.mlp.down_proj.weight", "not finite"});
  ASSERT_EQ(events("run", "nan").size(), 1u);
  EXPECT_THAT(events("run", "nan")[0].at("message").get<std::string>(),
              HasSubstr("model.layers.2.mlp.down_proj.weight"));
  EXPECT_EQ(e.lines("run").back().at("status"), "failed");
  const auto json = fathom_command(e, Experiment::train("mod", "run", whole + " --json"));
  EXPECT_EQ(json.status, 1);
  EXPECT_EQ(nlohmann::json::parse(json.out).at("status"), "failed");
}

// A finite weight so large that an op overflows.
TEST_F(Spikes, TheOpAndLayerThatOverflowAreNamed) {
  e.trained("mod", "half", half);
  poison("half", "model.layers.2.self_attn.qkv_proj.weight", 3e38F);
  const Outcome outcome = fathom_command(e, Experiment::train("mod", "run", whole));
  EXPECT_EQ(outcome.status, 1);
  ASSERT_EQ(events("run", "nan").size(), 1u);
  const std::string message = events("run", "nan")[0].at("message");
  EXPECT_THAT(message, HasSubstr("step 21"));
  EXPECT_THAT(message, HasSubstr("of layer 2"));
  EXPECT_THAT(outcome.err, HasSubstr("of layer 2"));
}

TEST_F(Spikes, SkipGivesUpAfterTenStepsInARow) {
  e.trained("mod", "half", half);
  poison("half", "model.layers.2.mlp.down_proj.weight", std::nanf(""));
  for (const std::string policy : {"skip", "warn"}) {  // an update that is not finite is never made
    const Outcome outcome =
        fathom_command(e, Experiment::train("mod", policy, whole + " --set train.on_spike=" + policy));
    EXPECT_EQ(outcome.status, 1);
    EXPECT_THAT(outcome.err, HasSubstr("10 skipped steps in a row"));
    EXPECT_EQ(events(policy, "nan").size(), 11u);
    for (const auto& line : e.lines(policy)) {
      if (line.contains("loss")) {
        EXPECT_TRUE(line.at("loss").is_null()) << line;
      }
    }
  }
}

// A batch that is a little harder than those before it is a spike here, and the next one is none.
TEST_F(Spikes, StepsBehindASkippedOneAreMade) {
  for (const char* kind : {"dense", "mod"}) {
    e.trained(kind, kind, testing::kSkipsNowAndThen);
    const auto skipped = events(kind, "spike");
    EXPECT_GE(skipped.size(), 1U) << kind;
    EXPECT_LE(skipped.size(), 50U) << kind;
    EXPECT_EQ(e.lines(kind).back().at("status"), "done");
    const std::string without = std::string(kind) + "-warned";
    e.trained(kind, without, std::string(testing::kSkipsNowAndThen) + " --set train.on_spike=warn");
    EXPECT_NE(content(e.newest_checkpoint(kind)), content(e.newest_checkpoint(without)))
        << "what was skipped was made";
  }
}

// The learning rate throws the loss up.
TEST_F(Spikes, ALossThatJumpsIsASpike) {
  const std::string wild =
      "--set train.schedule=constant --set train.warmup=1 --set train.lr=5 --set train.grad_clip=0 --resume "
      "half "
      "--set train.spike_factor=1.05 --set train.log_every=1 --set train.on_spike=";
  e.trained("dense", "half", "--set train.schedule=constant --set train.warmup=1 --set train.steps=25");
  const Outcome stop = fathom_command(e, Experiment::train("dense", "stop", wild + "stop"));
  expect_refusal(stop, 1,
                 {"Training stopped at step ", "times its running mean", "state before that step is saved",
                  "train.on_spike=skip", "train.lr"});
  ASSERT_EQ(events("stop", "spike").size(), 1u);
  const auto end = e.lines("stop").back();
  EXPECT_EQ(end.at("status"), "failed");
  // The state before the spike is saved, and its message names the step after it.
  EXPECT_EQ(e.newest_checkpoint("stop").substr(e.newest_checkpoint("stop").size() - 5, 2),
            std::to_string(end.at("step").get<int>()));

  const Outcome warn = fathom_command(e, Experiment::train("dense", "warn", wild + "warn"));
  EXPECT_EQ(warn.status, 0) << warn.err;
  EXPECT_GE(events("warn", "spike").size(), 1u);
  EXPECT_THAT(warn.err, HasSubstr("warned"));
  // on_spike may change in mid-run: the run that stopped goes on past it.
  const Outcome skip = fathom_command(e, Experiment::train("dense", "stop", wild + "skip"));
  EXPECT_GE(events("stop", "spike").size(), 2u);
  EXPECT_THAT(skip.err, HasSubstr("its update is skipped"));
}

}  // namespace
}  // namespace fathom
