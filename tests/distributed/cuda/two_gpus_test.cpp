// Two GPUs of one host: collectives of two ranks in two threads, and trainings by the binary. Skipped, with
// the reason, where there are fewer.
#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/capture.h"
#include "kernels/cuda/device_query.h"
#include "kernels/cuda/make.h"
#include "kernels/cuda/nccl_query.h"
#include "tests/distributed/cuda/device_numbers.h"
#include "tests/distributed/mpirun.h"
#include "tests/distributed/same_course.h"
#include "train/comm/open_communicator.h"
#include "train/comm/wire.h"

namespace fathom {
namespace {

using testing::Background;
using testing::DeviceNumbers;
using testing::Experiment;
using ::testing::HasSubstr;
using testing::kWithGpu;
using testing::Outcome;
using testing::Ranked;
using testing::wait_until;
using testing::words_of;

std::string why_no_two_gpus() {
  try {
    const std::size_t gpus = cuda::query_devices().devices.size();
    return gpus >= 2 ? cuda::why_no_nccl() : "there is one GPU alone";
  } catch (const UserError& e) {
    return e.what();
  }
}

class Gpus : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const std::string why = why_no_two_gpus(); !why.empty()) GTEST_SKIP() << why;
  }

  // As ranks of TCP, in threads of this process.
  static void as_two_ranks(const std::function<void(Communicator&, Backend&)>& body) {
    const int port = listen_anywhere(true).port;  // free, a moment ago
    std::atomic<int> through{0};
    std::vector<std::thread> threads;
    for (int rank = 0; rank < 2; ++rank) {
      threads.emplace_back([&, rank] {
        try {
          const Launch launch{
              .launcher = Launcher::Torchrun, .rank = rank, .size = 2, .master = "localhost", .port = port};
          const std::shared_ptr<Backend> backend = make_cuda_backend({}, rank);
          const auto comm = with_devices(open_communicator(launch), backend);
          body(*comm, *backend);
          comm->barrier();
          ++through;
        } catch (const std::exception& e) {
          ADD_FAILURE() << "rank " << rank << ": " << e.what();
        }
      });
    }
    for (std::thread& t : threads) t.join();
    EXPECT_EQ(through, 2);
  }

  static std::string endless(const std::string& more = "") {
    return Experiment::train("mod", "run", "--gpus 2 --set train.steps=1000000 " + more);
  }
  void await_checkpoint(Ranked& run) {
    wait_until([&] { return !e.newest_checkpoint("run").empty() || !run.running(); }, "a checkpoint");
  }
  void expect_goes_on() {
    Ranked again(e, words_of(endless()), Background::Gpus::Ours);
    const std::string resumed = "\"event\":\"resume\"";
    wait_until(
        [&] {
          return testing::read_bytes(e / "run/metrics.jsonl").find(resumed) != std::string::npos ||
                 !again.running();
        },
        "a resume");
    again.signal(SIGTERM);
    const Outcome outcome = again.wait();
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    EXPECT_EQ(e.lines("run").back().at("status"), "stopped");
  }

  Experiment e;
};

// Rank r has r + 1, r + 2, ...
std::vector<float> numbers_of(int rank, std::size_t n) {
  std::vector<float> all(n);
  for (std::size_t i = 0; i < n; ++i) all[i] = static_cast<float>(rank + 1) + static_cast<float>(i);
  return all;
}

TEST_F(Gpus, Collectives) {
  as_two_ranks([](Communicator& comm, Backend& backend) {
    EXPECT_THAT(comm.description(), HasSubstr("NCCL"));
    const int rank = comm.rank();
    constexpr std::size_t kN = 1000;
    const std::vector<float> first = numbers_of(0, kN), second = numbers_of(1, kN);
    DeviceNumbers x(backend, numbers_of(rank, kN));
    comm.all_reduce(x.view());
    comm.finish();
    const std::vector<float> sums = x.read();
    for (std::size_t i = 0; i < kN; ++i) ASSERT_EQ(sums[i], first[i] + second[i]);
    // Equal parts, parts of several sizes, and none.
    for (const std::vector<std::int64_t>& counts :
         {std::vector<std::int64_t>{500, 500}, std::vector<std::int64_t>{300, 700},
          std::vector<std::int64_t>{0, 1000}, std::vector<std::int64_t>{1000, 0}}) {
      DeviceNumbers y(backend, numbers_of(rank, kN));
      comm.reduce_scatter(y.view(), counts);
      comm.finish();
      const std::vector<float> part = y.read();
      const auto begin = static_cast<std::size_t>(offset_of(counts, rank));
      const auto end = begin + static_cast<std::size_t>(counts[static_cast<std::size_t>(rank)]);
      for (std::size_t i = begin; i < end; ++i) ASSERT_EQ(part[i], first[i] + second[i]);
      comm.all_gather(y.view(), counts);
      comm.finish();
      ASSERT_EQ(y.read(), sums);
    }
    DeviceNumbers z(backend, numbers_of(rank, kN));
    comm.broadcast(z.view(), 1);
    comm.finish();
    EXPECT_EQ(z.read(), second);
    EXPECT_EQ(sum_over(comm, rank + 1), 3);
  });
}

TEST_F(Gpus, CollectivesAreCaptured) {
  as_two_ranks([](Communicator& comm, Backend& backend) {
    const std::vector<std::int64_t> counts{256, 128};
    DeviceNumbers x(backend, std::vector<float>(384, 1));
    const auto step = [&] {
      backend.scale(x.view(), 2);
      comm.reduce_scatter(x.view(), counts);
      comm.finish();
      comm.all_gather(x.view(), counts);
      comm.finish();
    };
    step();
    const std::unique_ptr<CapturedWork> captured = capture(backend, step);
    for (int i = 0; i < 3; ++i) captured->launch();
    EXPECT_EQ(x.read(), std::vector<float>(384, 256));  // each step: times 2, and the sum of two
  });
}

TEST_F(Gpus, TwoRanksMakeTheRunOfOne) {
  for (const char* kind : {"dense", "mod", "mode"}) {
    const std::string run = kind;
    e.trained(kind, run + "-one", "--device cuda", kWithGpu);
    e.trained(kind, run + "-two", "--gpus 2", kWithGpu);
    testing::expect_close(e, run + "-one", run + "-two", 5e-3);
    EXPECT_EQ(e.lines(run + "-two").back().at("status"), "done");
    if (HasFailure()) FAIL() << kind;
  }
}

TEST_F(Gpus, TheSameRanksMakeTheSameRun) {
  const std::string same = "--gpus 2 --set deterministic=true --set train.precision=bf16 ";
  e.trained("mod", "a", same, kWithGpu);
  e.trained("mod", "b", same, kWithGpu);
  testing::expect_same_run(e, "a", "b");
  e.trained("mod", "c", same + "--resume a/checkpoints/step_00000035.h5", kWithGpu);
  EXPECT_EQ(testing::content(e.newest_checkpoint("a")), testing::content(e.newest_checkpoint("c")));
}

TEST_F(Gpus, ACheckpointKnowsNoNumberOfRanks) {
  e.trained("mod", "two", "--gpus 2", kWithGpu);
  const std::string from = "--resume two/checkpoints/step_00000035.h5 ";
  e.trained("mod", "one", from + "--device cuda", kWithGpu);
  testing::expect_close(e, "two", "one", 5e-3);
}

TEST_F(Gpus, GradientsAreSentAsBf16) {
  e.trained("mod", "one", "--gpus 2", kWithGpu);
  e.trained("mod", "two", "--gpus 2 --set train.reduction=bf16", kWithGpu);
  testing::expect_close(e, "one", "two", 2e-2);
}

TEST_F(Gpus, OfMpirun) {
  SKIP_WITHOUT_MPI();
  Ranked run(e, testing::mpirun(2, words_of(Experiment::train("mod", "run", "--device cuda"))),
             Background::Gpus::Ours);
  const Outcome outcome = run.wait();
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_THAT(outcome.err, HasSubstr("2 ranks by MPI"));
  EXPECT_THAT(outcome.err, HasSubstr("their GPUs by NCCL"));
}

TEST_F(Gpus, StopTogether) {
  Ranked run(e, words_of(endless()), Background::Gpus::Ours);
  await_checkpoint(run);
  run.signal(SIGTERM);
  const Outcome outcome = run.wait();
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_EQ(e.lines("run").back().at("status"), "stopped");
  expect_goes_on();
}

TEST_F(Gpus, AKilledRankIsNamed) {
  Ranked run(e, words_of(endless()), Background::Gpus::Ours);
  await_checkpoint(run);
  run.signal_rank(1, SIGKILL);
  const Outcome outcome = run.wait();
  EXPECT_EQ(outcome.status, 1);
  EXPECT_THAT(outcome.err, HasSubstr("fathom: Rank 1 ("));
  EXPECT_THAT(outcome.err, HasSubstr("ended without a word after step"));
  EXPECT_EQ(outcome.err.find("fathom: "), outcome.err.rfind("fathom: ")) << outcome.err;
  EXPECT_EQ(e.lines("run").back().at("status"), "failed");
  expect_goes_on();
}

TEST_F(Gpus, AKilledRank0IsNamed) {
  Ranked run(e, words_of(endless()), Background::Gpus::Ours);
  await_checkpoint(run);
  run.signal_rank(0, SIGKILL);
  const Outcome outcome = run.wait();
  EXPECT_EQ(outcome.status, 1);
  EXPECT_THAT(outcome.err, HasSubstr("fathom: Rank 0 ("));
  expect_goes_on();
}

TEST_F(Gpus, ARankThatHangsIsNamed) {
  Ranked run(e, words_of(endless("--set train.rank_timeout=3")), Background::Gpus::Ours);
  await_checkpoint(run);
  run.signal_rank(1, SIGSTOP);
  wait_until([&] { return run.said("fathom: "); }, "the news");
  run.signal_rank(1, SIGKILL);  // who is stopped does not end by itself
  const Outcome outcome = run.wait();
  EXPECT_EQ(outcome.status, 1);
  EXPECT_THAT(outcome.err, HasSubstr("fathom: Rank 1 ("));
  EXPECT_THAT(outcome.err, HasSubstr("has said nothing for 3 s"));
}

}  // namespace
}  // namespace fathom
