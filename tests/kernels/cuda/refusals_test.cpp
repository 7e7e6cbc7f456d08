// What the GPU's ops refuse before a kernel sees it.
#include "kernels/error.h"
#include "tests/kernels/cuda/on_device.h"

namespace fathom::kernel_test {
namespace {

class CudaRefusals : public CudaKernels {};

TEST_F(CudaRefusals, ABaseThatIsTheOutput) {
  const std::vector<Buffer> buffers = {random(DType::F32, 8, 1), random(DType::F32, 6, 2),
                                       random(DType::F32, 12, 3)};
  const std::vector<Buffer> after = run_on(cuda(), buffers, [](Backend& b, const std::vector<View>& v) {
    EXPECT_THROW(b.linear_add_forward(v[0], v[0], v[1], v[2], {2, 3, 4}), InternalError);
  });
  EXPECT_EQ(after[0].bytes(), buffers[0].bytes());
}

TEST_F(CudaRefusals, MoreRowsThanA32BitNumberCounts) {
  constexpr std::int64_t kRows = std::int64_t{1} << 31;
  run_on(cuda(), {{DType::F32, 4}}, [](Backend& b, const std::vector<View>& v) {
    // No such memory is there: the sizes alone are looked at.
    const View tokens{v[0].data, kRows, DType::I32}, dout{v[0].data, kRows, DType::F32};
    EXPECT_THROW(b.embedding_backward_accumulate(v[0], dout, tokens, kRows, 1), InternalError);
    EXPECT_THROW(b.top_k_rows({v[0].data, 1, DType::I32}, dout, 1, kRows, 1), InternalError);
  });
}

}  // namespace
}  // namespace fathom::kernel_test
