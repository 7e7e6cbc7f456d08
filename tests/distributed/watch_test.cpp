// Watches of two ranks within one process: what they find of each other. What ends a process is in
// faults_test.cpp.
#include "train/comm/watch.h"

#include <future>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "train/comm/host.h"
#include "train/comm/rank_error.h"

namespace fathom {
namespace {

using ::testing::HasSubstr;

// Runs one of two ranks each, which know each other's names.
class Watches : public ::testing::Test {
 protected:
  using Body = std::function<void(Watch&)>;

  void run(double timeout, const Body& rank_0, const Body& rank_1) {
    const auto body = [&](int rank, const Body& of_rank) {
      Watch watch(options(rank, timeout));
      of_rank(watch);
    };
    std::thread other([&] { body(1, rank_1); });
    body(0, rank_0);
    other.join();
  }

  WatchOptions options(int rank, double timeout) {
    const auto text_of_rank_0 = [this, rank](const std::string& text) {
      if (rank == 0) endpoint_.set_value(text);
      return rank == 0 ? text : endpoint_.get_future().get();
    };
    return {rank, {"here", "here"}, {"here, process 1", "here, process 2"}, timeout, 1, text_of_rank_0};
  }

  // What a rank throws that waits for others until it learns of a loss.
  static std::string found(Watch& watch) {
    try {
      for (;;) {
        watch.check();
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
      }
    } catch (const RankError& e) {
      return e.what();
    }
  }

  std::promise<std::string> endpoint_;
};

TEST_F(Watches, AProperEndIsNoLoss) {
  std::promise<void> gone;
  run(
      60,
      [&](Watch& watch) {
        gone.get_future().wait();
        watch.check();
        EXPECT_FALSE(watch.found_loss());
      },
      [&](Watch& watch) {
        watch.check();
        gone.set_value();
      });
}

TEST_F(Watches, TheReasonOfAFailureReachesTheOthers) {
  std::string of_rank_0;
  std::promise<void> at_step_7;
  run(
      60,
      [&](Watch& watch) {
        watch.set_progress(7);
        at_step_7.set_value();
        of_rank_0 = found(watch);
      },
      [&](Watch& watch) {
        at_step_7.get_future().wait();
        EXPECT_TRUE(watch.fail("the disk is full.")) << "rank 0 tells";
      });
  EXPECT_THAT(of_rank_0, HasSubstr("Rank 1 (here, process 2) failed after step 7: the disk is full."));
}

// Its reason may come in one piece with its first word.
TEST_F(Watches, AFailureAtOnceIsHeard) {
  for (int i = 0; i < 50; ++i) {
    endpoint_ = {};
    std::string of_rank_0;
    run(
        60, [&](Watch& watch) { of_rank_0 = found(watch); },
        [](Watch& watch) { EXPECT_TRUE(watch.fail("no memory.")); });
    ASSERT_THAT(of_rank_0, HasSubstr("failed before the first step: no memory."));
  }
}

TEST_F(Watches, RankZeroTellsOfItself) {
  std::string of_rank_1;
  run(
      60, [](Watch& watch) { EXPECT_FALSE(watch.fail("the lock is taken.")) << "nobody else tells"; },
      [&](Watch& watch) {
        of_rank_1 = found(watch);
        EXPECT_TRUE(watch.fail(of_rank_1));
      });
  EXPECT_THAT(of_rank_1,
              HasSubstr("Rank 0 (here, process 1) failed before the first step: the lock is taken."));
}

TEST_F(Watches, ARankThatAnswersAndDoesNotComeIsNamed) {
  std::string of_rank_0, of_rank_1;
  run(
      1,
      [&](Watch& watch) {
        watch.enter();
        of_rank_0 = found(watch);
      },
      [&](Watch& watch) { of_rank_1 = found(watch); });
  EXPECT_THAT(of_rank_0, HasSubstr("Rank 1 (here, process 2) answers, but has not come"));
  EXPECT_EQ(of_rank_1, of_rank_0);
}

TEST_F(Watches, ARankThatNeverConnectsIsNamed) {
  try {
    const Watch watch(options(0, 0.2));
    FAIL();
  } catch (const RankError& e) {
    EXPECT_THAT(e.what(), HasSubstr("Rank 1 (here, process 2) has not come within 0.2 s"));
  }
}

TEST(Host, HasAName) { EXPECT_FALSE(host_name().empty()); }

}  // namespace
}  // namespace fathom
