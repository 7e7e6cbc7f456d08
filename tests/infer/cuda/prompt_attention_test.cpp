// Prompts that attend without the cache, since nothing is in it yet: what follows sees what they left there.
#include <cmath>
#include <random>

#include <fmt/format.h>

#include "infer/engine.h"
#include "tests/devices.h"

namespace fathom {
namespace {

class CudaPromptAttention : public testing_support::OnCuda<::testing::Test> {
 protected:
  static constexpr std::int64_t kVocab = 64;

  static ModelConfig config() {
    ModelConfig m;
    m.vocab_size = kVocab;
    m.width = 128;
    m.depth = 3;
    m.heads = 2;
    m.kv_heads = 1;
    m.ffn_hidden = 192;
    m.max_seq_len = 2100;
    return m;
  }
  /// The logits behind a prompt and behind each of three tokens more.
  std::vector<std::vector<float>> logits(std::int64_t prompt, std::int64_t chunk,
                                         const RoutingConfig& routing) {
    Context c(shared_cuda(), DType::BF16);
    Transformer model(c, config(), routing, false);
    model.initialise(c, 3);
    std::mt19937 random(7);
    std::vector<std::int32_t> ids(static_cast<std::size_t>(prompt));
    for (std::int32_t& id : ids) id = static_cast<std::int32_t>(random() % kVocab);
    EngineOptions options;
    options.cache = {.block = 64, .bytes = std::int64_t{64} << 20};
    options.max_rows = chunk;
    options.max_sequences = 1;
    options.whole_rows = 0;
    Engine engine(c, model, options);
    std::vector<std::vector<float>> seen;
    engine.observe_logits([&](RequestId, std::int64_t, std::span<const float> row) {
      seen.emplace_back(row.begin(), row.end());
    });
    SamplingOptions sampling;
    sampling.temperature = 0;
    for (std::int32_t id = 1; id < kVocab; ++id)
      sampling.logit_bias[id] = -INFINITY;  // the same tokens follow
    engine.submit({.prompt = ids, .max_tokens = 4, .sampling = sampling});
    while (!engine.idle()) engine.step();
    return seen;
  }
};

TEST_F(CudaPromptAttention, IsCloseToThatOverTheCache) {
  for (const std::int64_t prompt : {1024, 2048, 2049}) {
    SCOPED_TRACE(prompt);
    const auto whole = logits(prompt, 2048, {}), pieces = logits(prompt, 500, {});
    ASSERT_EQ(whole.size(), 4U);
    ASSERT_EQ(pieces.size(), 4U);
    for (std::size_t i = 0; i < 4; ++i) {
      double errors = 0, squares = 0;
      for (std::size_t v = 0; v < whole[i].size(); ++v) {
        errors += std::pow(whole[i][v] - pieces[i][v], 2);
        squares += std::pow(pieces[i][v], 2);
      }
      EXPECT_LT(std::sqrt(errors / squares), 0.03) << "token " << i;
    }
  }
}

}  // namespace
}  // namespace fathom
