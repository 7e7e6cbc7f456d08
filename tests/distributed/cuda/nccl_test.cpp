// NCCL's collectives on one GPU, of one rank: that they reach the library, stand in the order of the
// backend's stream, can be captured and can be given up. What takes two GPUs is in two_gpus_test.cpp.
#include <memory>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/capture.h"
#include "kernels/cuda/device_query.h"
#include "kernels/cuda/nccl_query.h"
#include "tests/devices.h"
#include "tests/distributed/cuda/device_numbers.h"
#include "tests/system/cli.h"
#include "train/comm/device_communicator.h"
#include "train/comm/nccl_transport.h"
#include "train/comm/rank_error.h"

namespace fathom {
namespace {

using testing::DeviceNumbers;

class CudaNccl : public testing_support::OnCuda<::testing::Test> {
 protected:
  void SetUp() override {
    OnCuda::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    if (const std::string why = cuda::why_no_nccl(); !why.empty()) GTEST_SKIP() << why;
    const std::shared_ptr<Communicator> host = make_lone_communicator();
    std::unique_ptr<DeviceTransport> transport = make_nccl_transport(*host, shared_cuda());
    transport_ = transport.get();
    comm_ = make_device_communicator(host, std::move(transport));
  }

  DeviceTransport* transport_ = nullptr;
  std::shared_ptr<Communicator> comm_;
};

TEST_F(CudaNccl, OneRankHasItsOwnNumbers) {
  EXPECT_THAT(comm_->description(), ::testing::HasSubstr("NCCL 2."));
  const std::vector<float> numbers{1, 2, 3, 4, 5};
  const std::vector<std::int64_t> counts{5};
  DeviceNumbers there(cuda(), numbers);
  comm_->all_reduce(there.view());
  comm_->reduce_scatter(there.view(), counts);
  comm_->all_gather(there.view(), counts);
  comm_->broadcast(there.view(), 0);
  comm_->finish();
  cuda().scale(there.view(), 2);
  EXPECT_EQ(there.read(), (std::vector<float>{2, 4, 6, 8, 10}));
  comm_->finish();  // of nothing
  EXPECT_EQ(transport_->trouble(), "");
}

TEST_F(CudaNccl, CollectivesAreCaptured) {
  const std::vector<std::int64_t> counts{4};
  DeviceNumbers there(cuda(), {1, 2, 3, 4});
  const auto step = [&] {
    cuda().scale(there.view(), 2);
    comm_->reduce_scatter(there.view(), counts);
    comm_->finish();
    cuda().scale(there.view(), 3);
    comm_->all_gather(there.view(), counts);
    comm_->finish();
  };
  step();
  const std::unique_ptr<CapturedWork> captured = capture(cuda(), step);
  comm_->finish();  // of nothing that is not captured
  captured->launch();
  captured->launch();
  EXPECT_EQ(there.read(), (std::vector<float>{216, 432, 648, 864}));
}

TEST_F(CudaNccl, NothingBeginsBehindAnAbort) {
  DeviceNumbers there(cuda(), {1, 2});
  comm_->all_reduce(there.view());
  comm_->finish();
  comm_->fail("nothing in particular");
  EXPECT_THROW(comm_->all_reduce(there.view()), RankError);
  comm_->finish();
  EXPECT_EQ(there.read(), (std::vector<float>{1, 2}));
  comm_.reset();
  cuda().scale(there.view(), 2);
  EXPECT_EQ(there.read(), (std::vector<float>{2, 4}));
}

TEST_F(CudaNccl, AnAbortWaitsForNobodysCapturedWork) {
  DeviceNumbers there(cuda(), {1, 2});
  const auto step = [&] {
    comm_->all_reduce(there.view());
    comm_->finish();
  };
  step();
  std::unique_ptr<CapturedWork> captured = capture(cuda(), step);
  captured->launch();
  comm_->fail("nothing in particular");  // NCCL itself waits until the captured work is gone
  captured.reset();
  comm_.reset();
}

// What is waited for takes a while, and somebody else may be lost meanwhile.
TEST_F(CudaNccl, AWaitForTheDeviceCanBeEnded) {
  constexpr std::int64_t kMany = std::int64_t{1} << 28;
  const auto bytes = static_cast<std::size_t>(kMany) * sizeof(float);
  void* const data = cuda().allocate(bytes);
  int looks = 0;
  transport_->set_while_waiting([&](double seconds) {
    EXPECT_GE(seconds, 0);
    ++looks;
    throw RankError("somebody is lost");
  });
  for (int i = 0; i < 100 && looks == 0; ++i) {
    for (int j = 0; j < 50; ++j) cuda().fill({data, kMany, DType::F32}, 1.0);
    try {
      cuda().synchronize();
    } catch (const RankError& e) {
      EXPECT_STREQ(e.what(), "somebody is lost");
    }
  }
  EXPECT_EQ(looks, 1);
  transport_->set_while_waiting(nullptr);
  cuda().synchronize();
  cuda().release(data, bytes);
}

TEST_F(CudaNccl, MoreRanksThanGpusAreRefused) {
  const testing::Experiment e;
  const auto gpus = static_cast<int>(cuda::query_devices().devices.size());
  const std::string more = std::to_string(gpus + 1);
  testing::expect_refusal(
      testing::fathom_command(e, testing::Experiment::train("dense", "run", "--device cuda --ranks " + more),
                              testing::kWithGpu),
      1, {more + " ranks", "each needs one of its own", "--device cpu"});
  testing::expect_refusal(
      testing::fathom_command(e, testing::Experiment::train("dense", "run", "--gpus " + more),
                              testing::kWithGpu),
      1, {"--gpus " + more + " asks for", "shows " + std::to_string(gpus)});
}

}  // namespace
}  // namespace fathom
