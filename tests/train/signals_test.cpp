#include "train/signals.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

namespace fathom {
namespace {

// Runs `body` in a child and returns its wait status. SIGHUP is `hang_up` there, whatever it is here: who
// runs the tests under nohup has it ignored.
template <typename F>
int status_of_child(F&& body, sighandler_t hang_up = SIG_DFL) {
  const pid_t child = fork();
  if (child == 0) {
    signal(SIGHUP, hang_up);
    _exit(body());
  }
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  return status;
}

class Signals : public ::testing::TestWithParam<int> {};

TEST_P(Signals, TheFirstSetsAFlagAndTheProcessGoesOn) {
  const int status = status_of_child([] {
    StopSignals signals;
    if (stop_requested()) return 1;
    raise(GetParam());
    return stop_requested() && stop_signal() == GetParam() ? 7 : 2;
  });
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 7);
}

TEST_P(Signals, ASecondOneStopsAtOnce) {
  const int status = status_of_child([] {
    StopSignals signals;
    raise(GetParam());
    usleep(200'000);
    raise(GetParam());
    return 0;
  });
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 128 + GetParam());
}

INSTANTIATE_TEST_SUITE_P(All, Signals, ::testing::Values(SIGTERM, SIGINT, SIGHUP));

TEST(SignalPairs, NohupsIgnoredHangUpStaysIgnored) {
  const auto body = [] {
    StopSignals signals;
    raise(SIGHUP);
    return stop_requested() ? 1 : 7;
  };
  const int status = status_of_child(body, SIG_IGN);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 7);
}

// timeout(1) sends the same signal to the process and to its group.
TEST(SignalPairs, TwoSignalsAtTheSameMomentAreOneRequest) {
  const int status = status_of_child([] {
    StopSignals signals;
    raise(SIGTERM);
    raise(SIGTERM);
    return stop_requested() ? 7 : 1;
  });
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 7);
}

TEST(SignalPairs, TheHandlersAreGoneAfterwards) {
  const int status = status_of_child([] {
    { StopSignals signals; }
    raise(SIGTERM);
    return 0;
  });
  EXPECT_TRUE(WIFSIGNALED(status));
}

TEST(SignalPairs, NewHandlersStartWithAClearFlag) {
  const int status = status_of_child([] {
    {
      StopSignals signals;
      raise(SIGINT);
    }
    StopSignals signals;
    return stop_requested() ? 1 : 7;
  });
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 7);
}

}  // namespace
}  // namespace fathom
