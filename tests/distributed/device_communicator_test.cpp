// What a rank on a device does when another one is lost while it waits: what it waits for is aborted, and the
// loss is told. The transport and the watch are made up here; NCCL's and the real one are in cuda/.
#include "train/comm/device_communicator.h"

#include <memory>
#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "train/comm/rank_error.h"

namespace fathom {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

// What the test sets, and what it looks at.
struct Scene {
  bool lost = false;         // what the watch finds
  bool others_gone = false;  // what the transport meets
  std::string trouble;       // what it finds meanwhile
  int aborts = 0, began = 0, finished = 0, entered = 0, left = 0;
  std::function<void(double)> look;
};

class FakeTransport final : public DeviceTransport {
 public:
  explicit FakeTransport(Scene& scene) : scene_(scene) {}
  std::string description() const override { return "nothing"; }
  void all_reduce(View) override { begin(); }
  void reduce_scatter(View, std::span<const std::int64_t>) override { begin(); }
  void all_gather(View, std::span<const std::int64_t>) override { begin(); }
  void broadcast(View, int) override { begin(); }
  void finish() override { ++scene_.finished; }
  void set_while_waiting(std::function<void(double)> look) override { scene_.look = std::move(look); }
  std::string trouble() override { return scene_.trouble; }
  void abort() noexcept override { ++scene_.aborts; }

 private:
  void begin() {
    EXPECT_EQ(scene_.entered, scene_.left + 1);
    if (scene_.others_gone) throw RankError("its connection is closed");
    ++scene_.began;
  }
  Scene& scene_;
};

class FakeHost final : public Communicator {
 public:
  explicit FakeHost(Scene& scene) : scene_(scene) {}
  int rank() const override { return 1; }
  int size() const override { return 2; }
  std::string description() const override { return "2 ranks by magic"; }
  std::string where(int rank) const override { return "host " + std::to_string(rank); }
  int local_rank() const override { return 1; }
  int local_size() const override { return 2; }
  void all_reduce(View) override { FAIL() << "the device's memory is not the host's"; }
  void reduce_scatter(View, std::span<const std::int64_t>) override { FAIL(); }
  void all_gather(View, std::span<const std::int64_t>) override { FAIL(); }
  void broadcast(View, int) override { FAIL(); }
  void finish() override { FAIL(); }
  void all_reduce_host(std::span<double> values, Reduce) override {
    check();
    for (double& v : values) v *= 2;
  }
  void broadcast_host(std::span<std::byte>, int) override { check(); }
  std::vector<std::string> gather(const std::string& mine) override {
    check();
    return {mine, mine};
  }
  void barrier() override { check(); }
  void set_timeout(double) override {}
  void set_progress(std::int64_t) override {}
  bool fail(const std::string&) noexcept override { return true; }
  void enter() override {
    check();
    ++scene_.entered;
  }
  void leave() noexcept override { ++scene_.left; }
  void check() override {
    if (scene_.lost) throw RankError("Rank 0 (host 0) ended without a word");
  }

 private:
  Scene& scene_;
};

class OnDevice : public ::testing::Test {
 protected:
  // What RankError says that `call` throws.
  template <typename Call>
  static std::string error_of(const Call& call) {
    try {
      call();
    } catch (const RankError& e) {
      return e.what();
    }
    return "no error";
  }

  Scene scene_;
  std::shared_ptr<Communicator> comm_ =
      make_device_communicator(std::make_shared<FakeHost>(scene_), std::make_unique<FakeTransport>(scene_));
  float number_ = 0;
  const View view_{&number_, 1, DType::F32};
  const std::vector<std::int64_t> counts_{0, 1};
};

TEST_F(OnDevice, ItsMemoryIsTheTransportsAndTheRestTheHosts) {
  comm_->all_reduce(view_);
  comm_->reduce_scatter(view_, counts_);
  comm_->all_gather(view_, counts_);
  comm_->broadcast(view_, 0);
  comm_->finish();
  EXPECT_EQ(scene_.began, 4);
  EXPECT_EQ(scene_.finished, 1);
  EXPECT_EQ(scene_.entered, 4);
  EXPECT_EQ(scene_.left, 4);
  EXPECT_EQ(sum_over(*comm_, 3), 6);
  EXPECT_EQ(comm_->gather("x").size(), 2U);
  EXPECT_EQ(comm_->description(), "2 ranks by magic, their GPUs by nothing");
  EXPECT_EQ(comm_->where(0), "host 0");
  EXPECT_EQ(scene_.aborts, 0);
}

TEST_F(OnDevice, ALossEndsAWaitForTheDevice) {
  scene_.look(5);
  EXPECT_EQ(scene_.aborts, 0);
  scene_.lost = true;
  EXPECT_THAT(error_of([&] { scene_.look(5); }), HasSubstr("Rank 0 (host 0) ended"));
  EXPECT_GE(scene_.aborts, 1);
}

TEST_F(OnDevice, ALossThatTheHostMeetsEndsWhatTheDeviceDoes) {
  scene_.lost = true;
  EXPECT_THAT(error_of([&] { comm_->barrier(); }), HasSubstr("Rank 0"));
  EXPECT_EQ(scene_.aborts, 1);
  EXPECT_THAT(error_of([&] { comm_->all_reduce(view_); }), HasSubstr("Rank 0"));
  EXPECT_EQ(scene_.began, 0);
  EXPECT_EQ(scene_.entered, scene_.left);
}

TEST_F(OnDevice, WhatTheTransportMeetsIsToldWhereTheWatchKnowsNothing) {
  scene_.others_gone = true;
  EXPECT_THAT(error_of([&] { comm_->broadcast(view_, 0); }), HasSubstr("its connection is closed"));
  EXPECT_GE(scene_.aborts, 1);
  EXPECT_EQ(scene_.entered, scene_.left);
}

TEST_F(OnDevice, WhatTheTransportFindsEndsAWait) {
  scene_.trouble = "NCCL: remote process exited";
  EXPECT_THAT(error_of([&] { scene_.look(0.1); }), HasSubstr("NCCL: remote process exited"));
  EXPECT_GE(scene_.aborts, 1);
}

TEST_F(OnDevice, NobodyWaitsForEver) {
  comm_->set_timeout(3);
  comm_->set_progress(57);
  for (int s = 1; s < 30; ++s) scene_.look(s);
  EXPECT_EQ(scene_.aborts, 0);
  EXPECT_THAT(error_of([&] { scene_.look(30); }),
              AllOf(HasSubstr("Rank 1 (host 1)"), HasSubstr("30 s (10 times train.rank_timeout)"),
                    HasSubstr("after step 57")));
  EXPECT_EQ(scene_.aborts, 1);
}

// A process that was stopped, or its machine, for an hour between two looks has not waited for others so
// long.
TEST_F(OnDevice, APauseIsNoWait) {
  comm_->set_timeout(3);
  scene_.look(0);
  scene_.look(3600);
  EXPECT_EQ(scene_.aborts, 0);
  for (int s = 1; s < 29; ++s) scene_.look(3600 + s);
  EXPECT_EQ(scene_.aborts, 0);
  EXPECT_THAT(error_of([&] { scene_.look(3629); }), HasSubstr("has waited for 30 s"));
}

TEST_F(OnDevice, EachWaitIsCountedByItself) {
  comm_->set_timeout(3);
  for (int wait = 0; wait < 10; ++wait) {
    for (int s = 1; s < 30; ++s) scene_.look(s);
  }
  EXPECT_EQ(scene_.aborts, 0);
}

TEST_F(OnDevice, WhoFailsAbortsFirst) {
  EXPECT_TRUE(comm_->fail("no room on the disk"));
  EXPECT_EQ(scene_.aborts, 1);
}

TEST_F(OnDevice, NobodyIsLookedAfterOnceItIsGone) {
  ASSERT_TRUE(scene_.look);
  comm_.reset();
  EXPECT_FALSE(scene_.look);
}

}  // namespace
}  // namespace fathom
