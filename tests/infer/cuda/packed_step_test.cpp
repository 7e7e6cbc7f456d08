// Whole steps of decoding whose layers' weights are codes of 4 bits: against the whole text's pass in fp32 on
// the CPU with the numbers that the codes stand for, and against the same model op by op; and such steps over
// caches of codes.
#include "tests/infer/cuda/whole_step_models.h"

namespace fathom::whole_step_test {
namespace {

struct PackedCase {
  Case model;
  std::int64_t group;  // 0: a scale a row
  friend void PrintTo(const PackedCase& c, std::ostream* out) { *out << c.model.name; }
};

Quantization four_bits(std::int64_t group) { return {.method = "rtn", .bits = 4, .group = group}; }

std::vector<PackedCase> cases() {
  return {// Fewer runs of 128 columns than warps.
          {{"narrow", 256, 4, 4, 512, false, true, {}}, 0},
          {{"narrow_groups", 512, 4, 1, 384, true, false, {}}, 128},
          {{"groups_of_256", 512, 8, 2, 768, true, true, {}}, 256},
          // One scale a row where the group is all of it, several in the others.
          {{"groups_of_a_row", 512, 8, 2, 1024, true, true, {}}, 512},
          {{"wide_heads", 256, 4, 2, 512, true, true, {}, 128}, 0},
          {{"uneven", 1408, 11, 11, 1920, false, true, {}, 0, 2}, 0},
          {{"uneven_groups", 1408, 11, 11, 1920, false, true, {}, 0, 2}, 128},
          // More than a block of threads' ring holds, in tiles and in columns.
          {{"long", 1024, 8, 2, 20480, false, true, {}, 0, 1}, 0},
          {{"long_groups", 1280, 20, 4, 10240, false, true, {}, 0, 1}, 128},
          {{"aux", 256, 4, 2, 512, true, true, depth(CausalMethod::Aux, 2, Gate::Sigmoid)}, 0},
          {{"predictor", 256, 2, 2, 384, false, false, depth(CausalMethod::Predictor, 2, Gate::Raw)}, 128},
          {{"predictor_long", 768, 12, 12, 2816, true, true, depth(CausalMethod::Predictor, 2, Gate::Sigmoid),
            0, 2},
           0},
          {{"every_layer", 384, 3, 3, 256, true, true, depth(CausalMethod::Predictor, 1, Gate::Tanh)}, 128},
          {{"every_layer_aux", 256, 2, 1, 256, true, true, depth(CausalMethod::Aux, 1, Gate::Raw)}, 0}};
}

class CudaPackedSteps : public testing_support::OnCuda<::testing::TestWithParam<PackedCase>> {
 protected:
  Pair open(std::int64_t context) {
    return {shared_cuda(), GetParam().model, context, four_bits(GetParam().group)};
  }
};

TEST_P(CudaPackedSteps, AreCloseToTheWholePass) {
  Pair m = open(160);
  expect_close(m, {18, 40, 16, 90, 30});
}

TEST_P(CudaPackedSteps, AreCloseOverLongTexts) {
  Pair m = open(1600);
  expect_close(m, {1, 512, 64, 1500, 12});
  expect_close(m, {4, 512, 32, 900, 12});
}

// Of every number of rows, and with the same bits each time: nothing is read before it is there.
TEST_P(CudaPackedSteps, AreLikeTheModelOpByOp) {
  Pair m = open(320);
  for (const std::size_t rows : {1, 2, 3, 7, 8, 9, 12, 16}) {
    std::vector<std::int64_t> lengths;
    for (std::size_t i = 0; i < rows; ++i) lengths.push_back(static_cast<std::int64_t>(1 + i * 53 % 300));
    const auto whole = one_step(m, lengths, true), again = one_step(m, lengths, true),
               by_ops = one_step(m, lengths, false);
    EXPECT_EQ(whole, again) << rows << " rows";
    expect_like(whole, by_ops, 3e-2);  // op by op scale * code is rounded to bf16
  }
}

INSTANTIATE_TEST_SUITE_P(Models, CudaPackedSteps, ::testing::ValuesIn(cases()),
                         [](const auto& kind) { return kind.param.model.name; });

struct PackedOverCodes {
  PackedCase weights;
  int kv;
  bool transforms;  // queries and keys
  std::string name() const {
    return fmt::format("{}_{}_bits{}", weights.model.name, kv, transforms ? "_transformed" : "");
  }
  friend void PrintTo(const PackedOverCodes& c, std::ostream* out) { *out << c.name(); }
};

std::vector<PackedOverCodes> over_codes() {
  const PackedCase dense64{{"dense64", 256, 4, 4, 512, false, true, {}, 0, 2}, 0},
      dense128{{"dense128_groups", 512, 4, 1, 1024, true, false, {}, 0, 2}, 128},
      aux{{"aux_groups", 512, 8, 2, 768, true, true, depth(CausalMethod::Aux, 2, Gate::Sigmoid)}, 256},
      predictor{{"predictor", 512, 4, 2, 512, true, true, depth(CausalMethod::Predictor, 2, Gate::Raw)}, 0};
  return {{dense64, 4, true},  {dense128, 4, true}, {aux, 4, true},       {predictor, 4, true},
          {dense64, 8, false}, {dense128, 8, true}, {predictor, 4, false}};
}

class CudaPackedStepsOverCodes : public testing_support::OnCuda<::testing::TestWithParam<PackedOverCodes>> {
 protected:
  Pair open(std::int64_t context) const {
    const PackedOverCodes& p = GetParam();
    Quantization q = four_bits(p.weights.group);
    q.kv = p.kv;
    q.online.queries_keys = p.transforms;
    return {shared_cuda(), p.weights.model, context, q};
  }
};

// Few entries and many, in pieces and in all kinds of steps, and with the same bits each time.
TEST_P(CudaPackedStepsOverCodes, AreLikeTheModelOpByOp) {
  Pair m = open(2112);
  for (const std::vector<std::int64_t>& lengths :
       {std::vector<std::int64_t>{1}, {2100}, {129, 70, 1700}, {64, 65, 66, 256, 257, 900, 33, 2, 300}}) {
    for (const std::int64_t block : {16, 64}) expect_codes_close_to_ops(m, lengths, block);
    const KvCacheOptions cache = small_cache(m, lengths, 64);
    EXPECT_EQ(one_step(m, lengths, true, true, cache), one_step(m, lengths, true, true, cache))
        << lengths.size() << " rows";
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, CudaPackedStepsOverCodes, ::testing::ValuesIn(over_codes()),
                         [](const auto& kind) { return kind.param.name(); });

using CudaPackedStepsOpByOp = testing_support::OnCuda<::testing::Test>;

// What these steps do not know goes op by op.
TEST_F(CudaPackedStepsOpByOp, AreOfOtherCodes) {
  const Case plain{"plain", 512, 4, 4, 512, true, true, {}}, odd{"odd", 320, 5, 5, 512, true, true, {}};
  Quantization some = four_bits(0);
  some.kinds.erase("o_proj");
  const std::vector<std::int64_t> lengths = {40, 7};
  for (const auto& [model, quantization] : {std::pair{plain, Quantization{.method = "rtn", .bits = 8}},
                                            {plain, four_bits(64)},
                                            {plain, some},
                                            {plain, Quantization{.method = "rtn", .activations = 8}},
                                            {odd, four_bits(0)}}) {
    Pair m(shared_cuda(), model, 256, quantization);
    EXPECT_EQ(one_step(m, lengths, true, false).size(), lengths.size());
  }
}

}  // namespace
}  // namespace fathom::whole_step_test
