#include "train/schedule.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/error.h"
#include "tests/train/test_folder.h"

namespace fathom {
namespace {

TrainConfig config(Schedule schedule, double warmup) {
  TrainConfig c;
  c.lr = 1.0;
  c.schedule = schedule;
  c.warmup = warmup;
  c.min_lr_ratio = 0.1;
  c.wsd_decay = 0.25;
  return c;
}

TEST(Schedule, WarmUpStartsAboveZeroAndReachesTheRateInItsLastStep) {
  for (const Schedule s : {Schedule::Cosine, Schedule::Wsd, Schedule::Constant}) {
    const LrSchedule lr(config(s, 4), 20);
    EXPECT_DOUBLE_EQ(lr.at(0), 0.25);
    EXPECT_DOUBLE_EQ(lr.at(1), 0.5);
    EXPECT_DOUBLE_EQ(lr.at(2), 0.75);
    EXPECT_DOUBLE_EQ(lr.at(3), 1.0);
  }
}

TEST(Schedule, CosineByHand) {
  const LrSchedule lr(config(Schedule::Cosine, 4), 20);                       // 16 steps of cosine
  EXPECT_NEAR(lr.at(7), 0.1 + 0.9 * 0.5 * (1 + 0.70710678118654752), 1e-15);  // p = 1/4
  EXPECT_NEAR(lr.at(11), 0.55, 1e-15);                                        // p = 1/2
  EXPECT_NEAR(lr.at(19), 0.1, 1e-15);                                         // the last step
  EXPECT_NEAR(lr.at(20), 0.1, 1e-15);
  EXPECT_NEAR(lr.at(1000), 0.1, 1e-15);
  for (int s = 4; s < 20; ++s) EXPECT_LT(lr.at(s), lr.at(s - 1)) << s;
}

TEST(Schedule, WsdByHand) {
  const LrSchedule lr(config(Schedule::Wsd, 4), 20);  // 4 + 11 + 5
  EXPECT_EQ(lr.decay_steps(), 5);
  EXPECT_DOUBLE_EQ(lr.at(4), 1.0);
  EXPECT_DOUBLE_EQ(lr.at(14), 1.0);
  EXPECT_DOUBLE_EQ(lr.at(15), 1.0 - 0.9 / 5);
  EXPECT_NEAR(lr.at(19), 0.1, 1e-15);
  EXPECT_NEAR(lr.at(25), 0.1, 1e-15);
}

TEST(Schedule, ConstantStays) {
  const LrSchedule lr(config(Schedule::Constant, 0), 20);
  EXPECT_DOUBLE_EQ(lr.at(0), 1.0);
  EXPECT_DOUBLE_EQ(lr.at(19), 1.0);
}

TEST(Schedule, WarmUpIsAShareBelowOneAndStepsFromOneOn) {
  EXPECT_EQ(LrSchedule(config(Schedule::Cosine, 0.1), 50).warmup_steps(), 5);
  EXPECT_EQ(LrSchedule(config(Schedule::Cosine, 1), 50).warmup_steps(), 1);
  EXPECT_EQ(LrSchedule(config(Schedule::Cosine, 7), 50).warmup_steps(), 7);
  EXPECT_EQ(LrSchedule(config(Schedule::Cosine, 0), 50).warmup_steps(), 0);
}

TEST(Schedule, EdgesDoNotDivideByZero) {
  EXPECT_DOUBLE_EQ(LrSchedule(config(Schedule::Cosine, 5), 5).at(4), 1.0);  // warm-up all the way
  EXPECT_DOUBLE_EQ(LrSchedule(config(Schedule::Cosine, 5), 5).at(9), 1.0);
  EXPECT_DOUBLE_EQ(LrSchedule(config(Schedule::Cosine, 0), 1).at(0), 0.1);
  TrainConfig all_decay = config(Schedule::Wsd, 4);
  all_decay.wsd_decay = 1.0;
  EXPECT_EQ(LrSchedule(all_decay, 20).decay_steps(), 16);  // the warm-up comes first
  EXPECT_DOUBLE_EQ(LrSchedule(all_decay, 20).at(3), 1.0);
}

TEST(Schedule, AWarmUpLongerThanTheRunIsAUsageError) {
  EXPECT_THAT(testing_support::message_of<UsageError>([] { LrSchedule(config(Schedule::Cosine, 100), 50); }),
              ::testing::AllOf(::testing::HasSubstr("train.warmup"), ::testing::HasSubstr("100"),
                               ::testing::HasSubstr("50")));
}

}  // namespace
}  // namespace fathom
