// Caches of 4 and 8 bits: what they take, and what measurements fill them with.
#include "infer/kv_cache.h"

#include <cmath>

#include <gmock/gmock.h>

#include "infer/engine.h"
#include "kernels/error.h"
#include "tests/devices.h"

namespace fathom {
namespace {

using ::testing::HasSubstr;

ModelConfig model_config(std::int64_t width) {
  ModelConfig m;
  m.vocab_size = 31;
  m.width = width;
  m.depth = 2;
  m.heads = 2;
  m.kv_heads = 1;
  m.ffn_hidden = 16;
  m.max_seq_len = 64;
  return m;
}

TEST(KvCacheOfCodes, TakesTheBytesOfItsCodesAndScales) {
  Context c(make_cpu_backend({}, 1), DType::F32);
  Transformer model(c, model_config(128), {}, false);
  EXPECT_EQ(KvCache::entry_bytes(c, model), 2 * 64 * 4);
  model.set_kv_bits(8);
  EXPECT_EQ(KvCache::entry_bytes(c, model), 2 * (64 + 4));
  model.set_kv_bits(4);
  EXPECT_EQ(KvCache::entry_bytes(c, model), 2 * (32 + 4));
  // As many blocks as the memory holds, in groups of a block for each of the two layers.
  const KvCache cache(c, model, {.block = 16, .bytes = 5 * 2 * 16 * 72 + 71});
  EXPECT_EQ(cache.pool().blocks(), 10);
  EXPECT_EQ(cache.bytes_per_block(), 16 * 72);
  EXPECT_EQ(cache.memory().dtype(), DType::U8);
  EXPECT_EQ(cache.memory().size(), 10 * 16 * 72);
}

TEST(KvCacheOfCodes, RefusesOtherBits) {
  Context c(make_cpu_backend({}, 1), DType::F32);
  Transformer model(c, model_config(16), {}, false);
  try {
    model.set_kv_bits(5);
    ADD_FAILURE() << "no error";
  } catch (const UserError& e) {
    EXPECT_THAT(e.what(), HasSubstr("Keys and values of 5 bits"));
  }
  EXPECT_EQ(model.kv_bits(), 16);
}

// What is random is numbers: a text goes on from it.
class OnEveryDevice : public ::testing::TestWithParam<testing_support::Device> {};

TEST_P(OnEveryDevice, ATextGoesOnFromRandomEntries) {
  const testing_support::OpenedDevice opened = testing_support::open_device(GetParam());
  testing_support::skip_without(opened);
  if (!opened.backend) return;
  const DType dtype = opened.backend->is_cpu() ? DType::F32 : DType::BF16;
  Context c(opened.backend, dtype);
  for (const int bits : {16, 8, 4}) {
    SCOPED_TRACE(bits);
    Transformer model(c, model_config(128), {}, false);
    model.initialise(c, 1);
    model.set_kv_bits(bits);
    EngineOptions o;
    o.cache.block = 16;
    o.cache.bytes = 20 * 2 * 16 * KvCache::entry_bytes(c, model);
    Engine engine(c, model, o);
    const RequestId id = engine.submit({.prompt = std::vector<std::int32_t>(50, 3), .max_tokens = 4});
    engine.assume_computed(id, 1);
    std::int64_t tokens = 0;
    while (!engine.idle()) {
      for (const Event& e : engine.step()) {
        EXPECT_EQ(e.error, "");
        tokens += e.has_token ? 1 : 0;
      }
    }
    EXPECT_EQ(tokens, 4);
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, OnEveryDevice, ::testing::ValuesIn(testing_support::devices()),
                         [](const auto& d) { return std::string(testing_support::name_of(d.param)); });

}  // namespace
}  // namespace fathom
