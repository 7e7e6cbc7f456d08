// A fault of a step that was launched as one piece of work: the message names the step, not the copy that met
// it.
#include <memory>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/error.h"
#include "src/config/resolve.h"
#include "tests/forwarding_backend.h"
#include "train/step.h"

namespace fathom {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

struct NoWork final : CapturedWork {
  void launch() override {}
};

// Captures by doing; every copy to the host fails once it is told to.
class FailingDevice final : public testing_support::ForwardingBackend {
 public:
  FailingDevice() : ForwardingBackend(make_cpu_backend({}, 1)) {}
  bool can_capture() const override { return captures; }
  std::unique_ptr<CapturedWork> end_capture() override { return std::make_unique<NoWork>(); }
  std::unique_ptr<Readback> make_readback(std::size_t bytes) override {
    return Backend::make_readback(bytes);
  }
  void copy_to_host(void* host, const void* source, std::size_t bytes) override {
    if (fails) throw DeviceError("[copy_to_host] CUDA: an illegal memory access was encountered");
    inner().copy_to_host(host, source, bytes);
  }
  bool captures = true;
  bool fails = false;
};

Config small_config() {
  Config c;
  c.model.vocab_size = 64;
  c.model.width = 16;
  c.model.depth = 2;
  c.model.heads = 2;
  c.model.ffn_hidden = 32;
  c.train.seq_len = 8;
  c.train.batch_tokens = 16;
  c.train.steps = 4;
  c.train.precision = "fp32";
  return resolve(c);
}

// What is said of a fault in the third step.
std::string fault_of_a_step(bool captures) {
  const Config config = small_config();
  const auto device = std::make_shared<FailingDevice>();
  device->captures = captures;
  Context c(device, DType::F32);
  Transformer model(c, config.model, config.routing, true);
  model.initialise(c, 1);
  AdamW optimizer(c, model.parameters(), config.train);
  StepRunner stepper(c, model, optimizer, config, [&](std::int64_t, std::int64_t count) {
    const std::vector<std::int32_t> tokens(static_cast<std::size_t>(count * config.train.seq_len), 7);
    return make_host_batch(count, config.train.seq_len, tokens, tokens);
  });
  for (std::int64_t step = 0; step < 2; ++step) {
    EXPECT_TRUE(stepper.launch({step, 2 * step, 1e-3, {}}));
    EXPECT_TRUE(stepper.read().applied);
  }
  device->fails = true;
  try {
    stepper.launch({2, 4, 1e-3, {}});
    stepper.read();
  } catch (const DeviceError& e) {
    return e.what();
  }
  return "no DeviceError";
}

TEST(CapturedStep, AFaultNamesTheStepAndWhatItHolds) {
  EXPECT_THAT(fault_of_a_step(true), AllOf(StartsWith("Step 3 (captured: forward, backward, norms, update)"),
                                           HasSubstr("illegal memory access")));
}

TEST(CapturedStep, AFaultOfAStepThatRanOpByOpIsLeftAsItIs) {
  EXPECT_THAT(fault_of_a_step(false), AllOf(StartsWith("[copy_to_host]"), Not(HasSubstr("captured"))));
}

}  // namespace
}  // namespace fathom
