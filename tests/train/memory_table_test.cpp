// What is said before a training that will not fit.
#include "train/memory_table.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/error.h"

namespace fathom {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr double kGib = 1 << 30;
constexpr const char* kTable = "Memory: activations about 90 GiB";

std::string refusal(double needed, const MemoryRoom& room) {
  try {
    shortage(kTable, needed, room);
  } catch (const UserError& e) {
    return e.what();
  }
  return "";
}

TEST(MemoryTable, WhatFitsAndWhatIsUnknownIsNotSpokenOf) {
  EXPECT_EQ(shortage(kTable, 79 * kGib, {.total = 80 * kGib, .gpu = true}), "");
  EXPECT_EQ(shortage(kTable, 79 * kGib, {.total = 80 * kGib, .others = kGib, .gpu = true}), "");
  EXPECT_EQ(shortage(kTable, 1e18, {}), "");
}

TEST(MemoryTable, AGpuThatIsTooSmallIsRefusedAndAMachineMaySwap) {
  const MemoryRoom gpu{.total = 80 * kGib, .gpu = true}, machine{.total = 80 * kGib};
  EXPECT_THAT(refusal(90 * kGib, gpu), AllOf(HasSubstr(kTable), HasSubstr("this GPU's 80.0 GiB"),
                                             HasSubstr("train.micro_batch"), HasSubstr("train.recompute")));
  EXPECT_THAT(shortage(kTable, 90 * kGib, machine),
              AllOf(HasSubstr("this machine's 80.0 GiB"), Not(HasSubstr(kTable))));
  // The estimate is within a tenth: what may fit is tried.
  EXPECT_THAT(shortage(kTable, 87 * kGib, gpu), HasSubstr("train.micro_batch"));
}

TEST(MemoryTable, WhatOtherProgramsHoldIsNotThere) {
  const MemoryRoom shared{.total = 80 * kGib, .others = 60 * kGib, .gpu = true};
  EXPECT_THAT(refusal(30 * kGib, shared), AllOf(HasSubstr("20.0 GiB that other programs"),
                                                HasSubstr("80.0 GiB"), HasSubstr("nvidia-smi")));
  EXPECT_EQ(shortage(kTable, 19 * kGib, shared), "");
}

}  // namespace
}  // namespace fathom
