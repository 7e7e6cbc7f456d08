// An op that needs memory of its own on a full GPU. FATHOM_FILL_GPU=1 in the environment asks for these: they
// take all of the GPU's memory for a moment, and other programs would meet that.
#include <cstdlib>
#include <optional>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/error.h"
#include "src/core/allocator.h"
#include "tests/devices.h"

namespace fathom {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

class CudaOwnMemory : public testing_support::OnCuda<::testing::Test> {
 protected:
  void SetUp() override {
    OnCuda::SetUp();
    if (::testing::Test::IsSkipped() || ::testing::Test::HasFatalFailure()) return;
    if (std::getenv("FATHOM_FILL_GPU") == nullptr) GTEST_SKIP() << "FATHOM_FILL_GPU is not set.";
    numbers_ = allocator().allocate(2 * sizeof(float), MemoryTag::Data);
  }

  Allocator& allocator() {
    if (!allocator_) allocator_.emplace(shared_cuda());
    return *allocator_;
  }
  /// All that the GPU has in blocks of 8 MiB and more, which is less than an op's first block leaves to ask.
  std::vector<Storage> everything() {
    std::vector<Storage> blocks;
    for (std::size_t bytes = std::size_t{8} << 30; bytes >= std::size_t{8} << 20;) {
      try {
        blocks.push_back(allocator().allocate(bytes, MemoryTag::Activations));
      } catch (const MemoryError&) {
        bytes /= 2;
      }
    }
    return blocks;
  }
  // A sum has partial sums, in memory that ops share: 64 MiB at least.
  void sum() {
    auto* numbers = static_cast<float*>(numbers_.get());
    cuda().sum({numbers + 1, 1, DType::F32}, {numbers, 1, DType::F32});
    cuda().synchronize();
  }

 private:
  std::optional<Allocator> allocator_;
  Storage numbers_;
};

TEST_F(CudaOwnMemory, ComesFromTheAllocatorsCache) {
  everything();  // it is cached now
  ASSERT_GT(allocator().use().cached, std::size_t{1} << 30);
  sum();
  EXPECT_EQ(allocator().use().cached, 0U);
}

TEST_F(CudaOwnMemory, IsRefusedWithAnAccountOfAll) {
  const std::vector<Storage> held = everything();
  try {
    sum();
    ADD_FAILURE();
  } catch (const MemoryError& e) {
    EXPECT_THAT(e.what(),
                AllOf(HasSubstr("64.0 MiB more for workspace"), HasSubstr("activations"),
                      HasSubstr("ops' own"), HasSubstr("The device has"), HasSubstr("micro_batch")));
  }
}

}  // namespace
}  // namespace fathom
