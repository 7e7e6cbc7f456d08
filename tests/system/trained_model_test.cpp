// What a run folder carries to those that use its model: the row-invariant mode.
#include <gtest/gtest.h>

#include "src/io/hdf5_file.h"
#include "tests/system/cli.h"

namespace fathom {
namespace {

using testing::Experiment;
using testing::fathom_command;
using testing::Outcome;

// Row-invariant and fast products of a single row differ in the last bits, so logits tell which were used.
TEST(RowInvariantRun, NeedsNoFlag) {
  const Experiment e;
  const auto logits = [&](const std::string& run, const std::string& flags) {
    const Outcome outcome = fathom_command(e, "eval " + run + " --dump-logits l.h5 --prompt-ids 77 " + flags);
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    return H5Reader(e / "l.h5", "logits").read<float>("logits");
  };
  const auto logprobs = [&](const std::string& run, const std::string& flags) {
    return fathom_command(e, "generate " + run + " -p 'Mara lives' -n 8 --json --logprobs " + flags)
        .json()
        .at("logprobs");
  };
  e.trained("mod", "fast", "--set train.steps=20");
  EXPECT_NE(logits("fast", ""), logits("fast", "--invariant")) << "or this test shows nothing";
  EXPECT_NE(logprobs("fast", ""), logprobs("fast", "--invariant")) << "or this test shows nothing";
  e.trained("mod", "invariant", "--set train.steps=20 --set invariant=true");
  EXPECT_EQ(logits("invariant", ""), logits("invariant", "--invariant"));
  EXPECT_EQ(logprobs("invariant", ""), logprobs("invariant", "--invariant"));
}

}  // namespace
}  // namespace fathom
