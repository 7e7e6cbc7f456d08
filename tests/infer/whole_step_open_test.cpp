// Which models' steps a backend is asked to do as a whole, and what it is told of their weights.
#include <gmock/gmock.h>

#include "infer/engine.h"
#include "infer/quant/quantize_model.h"
#include "tests/forwarding_backend.h"
#include "tests/quant/round_to_nearest.h"

namespace fathom {
namespace {

/// Can do no step, and remembers what it was asked for.
class AskedBackend final : public testing_support::ForwardingBackend {
 public:
  using ForwardingBackend::ForwardingBackend;
  std::unique_ptr<Decoder> make_decoder(const DecoderModel& model) override {
    asked.push_back(model);
    return nullptr;
  }
  std::vector<DecoderModel> asked;
};

class WholeStepIsAskedFor : public ::testing::Test {
 protected:
  ModelConfig config() const {
    ModelConfig m;
    m.vocab_size = 31;
    m.width = 32;
    m.depth = 2;
    m.heads = m.kv_heads = 2;
    m.ffn_hidden = 48;
    m.max_seq_len = 16;
    return m;
  }
  /// Whether an engine of the model asked for steps.
  bool asks(const Transformer& model) {
    backend_->asked.clear();
    EngineOptions o;
    o.cache.bytes = 1 << 20;
    const Engine engine(c_, model, o);
    return !backend_->asked.empty();
  }
  bool asks(const Quantization& q, bool quantized = true) {
    Transformer model(c_, config(), {}, false);
    model.initialise(c_, 1);
    if (!quantized) {
      Transformer other(c_, config(), {}, q);
      other.initialise(c_, 1);
      return asks(other);
    }
    few_ = quantize_model(c_, model, q, quant_test::round_to_nearest).model;
    return asks(*few_);
  }

  std::shared_ptr<AskedBackend> backend_ = std::make_shared<AskedBackend>(make_cpu_backend({}, 1));
  Context c_{backend_, DType::F32};
  std::unique_ptr<Transformer> few_;
};

TEST_F(WholeStepIsAskedFor, WithNumbers) {
  Transformer model(c_, config(), {}, false);
  model.initialise(c_, 1);
  ASSERT_TRUE(asks(model));
  const DecoderLayer& l = backend_->asked[0].layers[1];
  EXPECT_FALSE(l.qkv.is_packed());
  EXPECT_EQ(l.down.numbers.data, model.parameters().get("model.layers.1.mlp.down_proj.weight").data());
  EXPECT_EQ(backend_->asked[0].cache.bits, 16);
  EXPECT_FALSE(backend_->asked[0].transforms_heads);
}

// Of caches, and of what goes into them, the backend says whether it can.
TEST_F(WholeStepIsAskedFor, WithCachesOfCodes) {
  ASSERT_TRUE(asks({.bits = 4, .kv = 4, .online = {.queries_keys = true}}));
  const DecoderModel& both = backend_->asked[0];
  EXPECT_EQ(both.cache.bits, 4);
  EXPECT_TRUE(both.transforms_heads);
  EXPECT_TRUE(both.layers[0].down.is_packed());
  Transformer model(c_, config(), {}, false);
  model.initialise(c_, 1);
  model.set_kv_bits(8);
  ASSERT_TRUE(asks(model));
  EXPECT_EQ(backend_->asked[0].cache.bits, 8);
  EXPECT_FALSE(backend_->asked[0].transforms_heads);
}

TEST_F(WholeStepIsAskedFor, WithMeansOfKeys) {
  ASSERT_TRUE(asks({.bits = 4, .kv = 4, .key_means = true}));
  for (std::int64_t layer = 0; layer < 2; ++layer) {
    const ConstView& means = backend_->asked[0].layers[static_cast<std::size_t>(layer)].key_means;
    EXPECT_EQ(means.data, few_->key_means(layer).data());
    EXPECT_EQ(means.size, 32);
  }
  ASSERT_TRUE(asks({.bits = 4, .kv = 4}));
  EXPECT_FALSE(backend_->asked[0].layers[0].key_means);
}

TEST_F(WholeStepIsAskedFor, WithCodes) {
  ASSERT_TRUE(asks({.bits = 4, .group = 16}));
  ASSERT_EQ(backend_->asked[0].layers.size(), 2);
  for (const DecoderLayer& l : backend_->asked[0].layers) {
    for (const DecoderMatrix* w : {&l.qkv, &l.out, &l.gate_up, &l.down}) {
      ASSERT_TRUE(w->is_packed());
      EXPECT_EQ(w->codes.format.bits, 4);
      EXPECT_EQ(w->codes.format.group, 16);
    }
  }
  const PackedTensor& down = few_->parameters().packed("model.layers.1.mlp.down_proj.weight");
  EXPECT_EQ(backend_->asked[0].layers[1].down.codes.codes.data, down.codes.data());
  EXPECT_EQ(backend_->asked[0].layers[1].down.codes.scales.data, down.scales.data());
  // Only some of a layer's matrices.
  ASSERT_TRUE(asks({.bits = 8, .kinds = {"down_proj"}}));
  EXPECT_TRUE(backend_->asked[0].layers[0].down.is_packed());
  EXPECT_FALSE(backend_->asked[0].layers[0].out.is_packed());
}

TEST_F(WholeStepIsAskedFor, NotWithTransformsOrRowsOfCodes) {
  EXPECT_FALSE(asks({.bits = 4, .activations = 8}));
  EXPECT_FALSE(asks({.bits = 4, .online = {.down = true}}));
  EXPECT_FALSE(asks({.method = "rotate-only", .bits = 16, .kinds = {}, .online = {.heads = true}}, false));
  EXPECT_TRUE(asks({.method = "rotate-only", .bits = 16, .kinds = {}}, false));
}

}  // namespace
}  // namespace fathom
