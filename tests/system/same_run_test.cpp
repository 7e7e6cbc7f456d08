// What a run goes on with is what it began with: its config, its model, its text.
#include <algorithm>
#include <cmath>
#include <filesystem>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/system/cli.h"

namespace fathom {
namespace {

namespace fs = std::filesystem;
using testing::content;
using testing::expect_refusal;
using testing::Experiment;
using testing::fathom_command;
using ::testing::HasSubstr;
using testing::Outcome;

class SameRun : public ::testing::Test {
 protected:
  Outcome train(const std::string& kind, const std::string& run, const std::string& more) const {
    return fathom_command(e, Experiment::train(kind, run, more));
  }

  Experiment e;
};

TEST_F(SameRun, WithoutItsConfigFileTheCheckpointsConfigIsCompared) {
  e.trained("dense", "run");
  fs::remove(e / "run/config.yaml");
  const auto before = content(e.newest_checkpoint("run"));
  expect_refusal(train("dense", "run", "--set train.lr=1e-2 --set model.rope_theta=500"), 1,
                 {"step_00000040.h5", "another config", "model.rope_theta: 500 here, 10000 there",
                  "train.lr: 0.01 here, 0.003 there"});
  EXPECT_FALSE(fs::exists(e / "run/config.yaml"));
  EXPECT_EQ(content(e.newest_checkpoint("run")), before);
  e.trained("dense", "run", "--set train.log_every=7 --set train.recompute=block");
}

TEST_F(SameRun, AConfigFileOfAnotherRunDoesNotHideTheCheckpoints) {
  e.trained("dense", "run");
  e.trained("dense", "other", "--set model.norm_eps=1e-6 --set train.steps=2");
  fs::copy_file(e / "other/config.yaml", e / "run/config.yaml", fs::copy_options::overwrite_existing);
  expect_refusal(train("dense", "run", "--set model.norm_eps=1e-6 --set train.steps=2"), 1,
                 {"step_00000040.h5", "another config", "model.norm_eps", "train.steps: 2 here, 40 there"});
}

// A config that somebody wrote where the run is to write its own.
TEST_F(SameRun, AConfigWrittenByHandIsNotLost) {
  const std::string mine = "# learning rate found by hand\n" + testing::read_bytes(e / "dense.yaml");
  const auto from_folder = [&](const std::string& more) {
    return fathom_command(e, "train run/config.yaml --run-dir run --threads 1 " + more);
  };
  const auto spared = [&](const Outcome& outcome, std::initializer_list<std::string> words) {
    expect_refusal(outcome, 1, words);
    EXPECT_EQ(testing::read_bytes(e / "run/config.yaml"), mine);
  };
  fs::create_directory(e / "run");
  testing::write_bytes(e / "run/config.yaml", mine);
  for (const char* const more : {"--set train.lr=1e-2", "--set train.lr=1e-2 --dry-run"}) {
    spared(from_folder(more),
           {"cannot write run/config.yaml", "train.lr: 0.01 here, 0.003 there", "be lost"});
  }
  spared(train("mod", "run", ""), {"run/config.yaml", "routing.kind: mod here, none there"});
  EXPECT_EQ(e.newest_checkpoint("run"), "");
  // It stays where it says the same, at the start and at every other.
  for (int i = 0; i < 2; ++i) {
    const Outcome done = from_folder("");
    EXPECT_EQ(done.status, 0) << done.err;
    EXPECT_EQ(testing::read_bytes(e / "run/config.yaml"), mine);
    if (i == 0) fs::remove(e.newest_checkpoint("run"));
  }
  spared(from_folder("--set train.log_every=5"), {"train.log_every: 5 here, 1 there"});
  e.trained("dense", "whole");
  testing::expect_same_run(e, "whole", "run");
}

TEST_F(SameRun, AFileThatIsNoConfigIsNotLost) {
  fs::create_directory(e / "run");
  testing::write_bytes(e / "run/config.yaml", "to do: [find out");
  expect_refusal(train("dense", "run", ""), 1, {"run/config.yaml", "not a config"});
  EXPECT_EQ(testing::read_bytes(e / "run/config.yaml"), "to do: [find out");
  testing::write_bytes(e / "run/config.yaml", "");
  e.trained("dense", "run");
  EXPECT_THAT(testing::read_bytes(e / "run/config.yaml"), HasSubstr("log_every: 1\n"));
}

// What Fathom printed is lost as well before there is a run; then it is the run's own and follows it.
TEST_F(SameRun, ThePrintedConfigFollowsItsRun) {
  fs::create_directory(e / "run");
  testing::write_bytes(e / "run/config.yaml", fathom_command(e, "train dense.yaml --print-config").out);
  expect_refusal(train("dense", "run", "--set train.log_every=5"), 1, {"train.log_every: 5 here, 1 there"});
  e.trained("dense", "run");
  fs::remove(e.newest_checkpoint("run"));
  e.trained("dense", "run", "--set train.log_every=5");
  EXPECT_THAT(testing::read_bytes(e / "run/config.yaml"), HasSubstr("log_every: 5\n"));
}

TEST_F(SameRun, AnotherRunsCheckpointIsOfTheSameModel) {
  e.trained("dense", "dense");
  e.trained("mod", "mod");
  const std::string longer = " --set train.steps=50";
  const auto refused = [&](const std::string& kind, const std::string& more,
                           std::initializer_list<std::string> words) {
    SCOPED_TRACE(more);
    expect_refusal(train(kind, "new", more + longer), 1, words);
    EXPECT_EQ(e.newest_checkpoint("new"), "");
    EXPECT_FALSE(fs::exists(e / "new/config.yaml"));
  };
  refused("dense", "--resume dense --set model.heads=4",
          {"dense/checkpoints/step_00000040.h5", "another model", "model.heads: 4 here, 2 there"});
  refused("dense", "--resume dense --set model.rope_theta=500", {"model.rope_theta"});
  refused("mod", "--resume mod --set routing.capacity=0.5", {"routing.capacity: 0.5 here, 0.25 there"});
  refused("mod", "--resume mod --set routing.gate=sigmoid", {"routing.gate"});
  refused("mod", "--resume mod --set routing.selection=stochastic", {"routing.selection"});
  // What leaves the model's function alone may change; so may how it is trained.
  const std::string free =
      "--set routing.causal.threshold=0.4 --set routing.causal.aux_weight=0.1 --set model.max_seq_len=64 "
      "--set train.lr=1e-4 --set train.micro_batch=8 --set seed=5 --resume mod" +
      longer;
  e.trained("mod", "new", free);
  EXPECT_EQ(e.lines("new").back().at("steps"), 50);
  e.trained("dense", "new_dense", "--resume dense --set routing.capacity=0.5" + longer);
}

// What an error before the first checkpoint tells to change may be changed.
TEST_F(SameRun, AFolderWithoutACheckpointHoldsNoRunToGoOnWith) {
  const std::string never_saved = "--set train.steps=100000 --set train.checkpoint_every=0";
  testing::Background run(e, Experiment::train("dense", "run", never_saved));
  testing::wait_until(
      [&] {
        return testing::read_bytes(e / "run/metrics.jsonl").find("{\"step\":3,") != std::string::npos ||
               !run.running();
      },
      "step 3");
  run.signal(SIGKILL);
  EXPECT_EQ(run.wait().status, -SIGKILL);
  e.trained("dense", "whole", "--set train.micro_batch=8");
  e.trained("dense", "run", "--set train.micro_batch=8");
  testing::expect_same_run(e, "whole", "run");
  // A finished run is one, though its checkpoints were removed.
  const std::string metrics = testing::read_bytes(e / "run/metrics.jsonl");
  fs::remove_all(e / "run/checkpoints");
  expect_refusal(train("dense", "run", "--set train.micro_batch=4"), 1,
                 {"run of another config", "train.micro_batch: 4 here, 8 there"});
  EXPECT_EQ(testing::read_bytes(e / "run/metrics.jsonl"), metrics);
}

// A validation text that no model of these tests predicts well.
void make_noise(const Experiment& e) {
  std::string noise;
  for (unsigned i = 0; i < 20000; ++i) noise += static_cast<char>('!' + (i * i * 2654435761U >> 13) % 90);
  testing::write_bytes(e / "noise.txt", noise);
  ASSERT_EQ(fathom_command(e, "data prepare noise.txt -o noise.h5").status, 0);
}

TEST_F(SameRun, ItsEvaluationsAreOfOneText) {
  make_noise(e);
  e.trained("dense", "run");
  expect_refusal(train("dense", "run", "--set data.valid=noise.h5"), 1,
                 {"data.valid", "noise.h5", "other text", "run's evaluations"});
  // The text counts, not where it lies; and a text after none is no other one.
  fs::copy_file(e / "train.valid.h5", e / "moved.h5");
  e.trained("dense", "run", "--set data.valid=moved.h5");
  e.trained("dense", "run", "--set data.valid=null");
  expect_refusal(train("dense", "run", "--set data.valid=noise.h5"), 1, {"data.valid"});
  e.trained("dense", "blind", "--set data.valid=null");
  e.trained("dense", "blind", "--set data.valid=noise.h5");
}

TEST_F(SameRun, TheBestEvaluationIsItsOwn) {
  make_noise(e);
  e.trained("dense", "first");
  e.trained("dense", "second", "--resume first --set train.steps=50 --set data.valid=noise.h5");
  double best = INFINITY;
  for (const EvalRecord& r : e.metrics("second").evals) best = std::min(best, r.judged_loss());
  EXPECT_GT(best, e.lines("first").back().at("best_val_loss"));
  EXPECT_EQ(e.lines("second").back().at("best_val_loss"), best);
  EXPECT_GT(e.lines("second").back().at("best_step"), 40);
  e.trained("dense", "third", "--resume first --set train.steps=50 --set data.valid=null");
  EXPECT_FALSE(e.lines("third").back().contains("best_val_loss"));
}

}  // namespace
}  // namespace fathom
