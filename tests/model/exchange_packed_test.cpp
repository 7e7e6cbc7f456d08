// Model folders with weights of few bits: they come back to the byte, and hostile ones are refused in words.
#include <cmath>
#include <cstring>
#include <functional>

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "infer/generate.h"
#include "src/config/resolve.h"
#include "src/io/safetensors.h"
#include "src/model/exchange.h"
#include "tests/io/mutate.h"
#include "tests/io/temp.h"
#include "tests/model/small_model.h"
#include "tests/quant/round_to_nearest.h"

namespace fathom::model_test {
namespace {

using nlohmann::json;
using testing::expect_user_error;
using testing::read_bytes;
using testing::TempFolder;
using testing::write_bytes;

class ExchangePacked : public ::testing::Test {
 protected:
  LoadedModel made(const RoutingConfig& routing, const Quantization& q) {
    ModelConfig model = small_config();
    model.kv_heads = 2;
    SmallModel whole(DType::F32, model, routing);
    LoadedModel m;
    m.config.model = model;
    m.config.routing = routing;
    m.config = resolve(m.config);
    m.meta.tokenizer_kind = m.meta.tokenizer_hash = "bytes";
    m.model = std::move(quantize_model(context_, whole.model, q, quant_test::round_to_nearest).model);
    return m;
  }
  LoadedModel loaded() { return load_model(folder_ / "m", context_); }
  Exported exported(const LoadedModel& m, const std::string& name = "m") {
    return export_model(m, context_.backend(), folder_ / name);
  }
  std::vector<float> logits(const LoadedModel& m) {
    return causal_logits(context_, *m.model, {1, 5, 22, 0, 7, 7, 3}, Causal{});
  }
  void refused(std::initializer_list<std::string> words) {
    expect_user_error([&] { loaded(); }, words);
  }
  /// quantization_config of folder m, with a change.
  void refused_with(const std::function<void(json&)>& change, std::initializer_list<std::string> words) {
    const std::string good = read_bytes(folder_ / "m/config.json");
    json config = json::parse(good);
    change(config["quantization_config"]);
    write_bytes(folder_ / "m/config.json", config.dump());
    refused(words);
    write_bytes(folder_ / "m/config.json", good);
  }
  /// One of the tensors of folder m with a change: its entry, and its bytes; an empty name leaves it out.
  void refused_tensor(const std::string& name,
                      const std::function<void(SafetensorsEntry&, std::vector<std::byte>&)>& change,
                      std::initializer_list<std::string> words) {
    const std::string path = folder_ / "m/model.safetensors", good = read_bytes(path);
    {
      const SafetensorsFile file(path);
      std::vector<SafetensorsEntry> entries;
      std::vector<std::vector<std::byte>> data;
      for (SafetensorsEntry entry : file.entries()) {
        const auto from = file.data(entry.name);
        std::vector<std::byte> bytes(from.begin(), from.end());
        if (entry.name == name) change(entry, bytes);
        bytes.resize(entry.bytes());
        if (entry.name.empty()) continue;
        entries.push_back(entry);
        data.push_back(std::move(bytes));
      }
      SafetensorsWriter out(path, entries);
      for (std::size_t i = 0; i < entries.size(); ++i) out.write(entries[i].name, data[i]);
      out.commit();
    }
    refused(words);
    write_bytes(path, good);
  }

  TempFolder folder_;
  Context context_{make_cpu_backend({}), DType::F32};
};

TEST_F(ExchangePacked, EveryKindComesBackToTheByte) {
  const std::vector<RoutingConfig> routings = {
      by(CausalMethod::None), routed(CausalMethod::Both),
      with_experts(by(CausalMethod::Predictor), RoutingKind::Moe),
      with_experts(routed(CausalMethod::Predictor), RoutingKind::ModeStaged),
      with_experts(by(CausalMethod::Predictor), RoutingKind::ModeIntegrated)};
  for (const RoutingConfig& routing : routings) {
    for (const Quantization& q :
         {Quantization{.method = "rtn", .bits = 4}, Quantization{.bits = 8, .group = 4, .rotation_seed = 7},
          Quantization{.bits = 4, .group = 2, .kinds = {"down_proj", "qkv_proj"}},
          Quantization{.method = "quarot",
          .bits = 4,
          .rotation_seed = 1,
          .activations = 4,
          .activation_clip = 0.9,
          .online = {.down = true, .heads = true}},
          Quantization{.bits = 8, .kinds = {"o_proj"}, .activations = 8},
          Quantization{.method = "rotate-only",
          .bits = 16,
          .rotation_seed = 1,
          .kinds = {},
          .online = {.down = true, .heads = true, .queries_keys = true}},
          Quantization{.bits = 4, .group = 2, .kv = 4, .kinds = {"down_proj", "qkv_proj"}},
          Quantization{.bits = 16, .kv = 8, .kinds = {}}}) {
      SCOPED_TRACE(fmt::format("{} bits, groups of {}", q.bits, q.group));
      const LoadedModel m = made(routing, q);
      const double bytes = exported(m).bytes;
      const LoadedModel back = loaded();
      ASSERT_NE(back.model->quantization(), nullptr);
      EXPECT_EQ(*back.model->quantization(), q);
      EXPECT_EQ(back.model->kv_bits(), q.kv);
      EXPECT_EQ(logits(back), logits(m));
      EXPECT_EQ(exported(back, "again").bytes, bytes);
      for (const char* file : {"/config.json", "/model.safetensors"})
        EXPECT_EQ(read_bytes(folder_ / ("m" + std::string(file))),
                  read_bytes(folder_ / ("again" + std::string(file))));
    }
  }
}

// What docs/formats.md says of names, types, shapes and bytes.
TEST_F(ExchangePacked, ATensorIsItsCodesAndItsScales) {
  const LoadedModel m = made(by(CausalMethod::None), {.bits = 4, .group = 8, .kinds = {"qkv_proj"}});
  exported(m);
  const SafetensorsFile file(folder_ / "m/model.safetensors");
  const std::string name = "model.layers.1.self_attn.k_proj.weight";
  EXPECT_EQ(file.find(name), nullptr);
  const SafetensorsEntry *codes = file.find(name + "_packed"), *scales = file.find(name + "_scale");
  ASSERT_NE(codes, nullptr);
  ASSERT_NE(scales, nullptr);
  EXPECT_EQ(codes->type, SafetensorsType::U8);
  EXPECT_EQ(codes->shape, (std::vector<std::int64_t>{8, 8}));
  EXPECT_EQ(scales->type, SafetensorsType::F32);
  EXPECT_EQ(scales->shape, (std::vector<std::int64_t>{8, 2}));
  const std::vector<float> numbers = dequantized(
      context_.backend(), m.model->parameters().packed("model.layers.1.self_attn.qkv_proj.weight"));
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(file.data(codes->name).data());
  std::vector<float> scale(16);
  std::memcpy(scale.data(), file.data(scales->name).data(), 64);
  for (std::size_t r = 0; r < 8; ++r) {
    for (std::size_t c = 0; c < 16; ++c) {
      const int half = bytes[r * 8 + c / 2] >> (c % 2 * 4) & 15;
      EXPECT_EQ(scale[r * 2 + c / 8] * static_cast<float>(half < 8 ? half : half - 16),
                numbers[(16 + r) * 16 + c]);
    }
  }
  exported(made(by(CausalMethod::None), {.bits = 8}));
  const SafetensorsFile eight(folder_ / "m/model.safetensors");
  EXPECT_EQ(eight.find(name + "_packed")->type, SafetensorsType::I8);
  EXPECT_EQ(eight.find(name + "_packed")->shape, (std::vector<std::int64_t>{8, 16}));
  EXPECT_EQ(eight.find(name + "_scale")->shape, (std::vector<std::int64_t>{8, 1}));
}

TEST_F(ExchangePacked, AConfigThatLiesIsRefused) {
  exported(made(routed(CausalMethod::Both), {.bits = 4, .group = 4}));
  refused_with([](json& q) { q["version"] = 4; }, {"config.json", "version 4", "reads versions 1 to 3"});
  refused_with([](json& q) { q.erase("version"); }, {"version null", "reads versions 1 to 3"});
  refused_with([](json& q) { q["bits"] = 16; }, {"config.json", "16 bits"});
  refused_with([](json& q) { q["quant_method"] = "gptq"; }, {"config.json", "quant_method", "gptq"});
  refused_with([](json& q) { q = "few"; }, {"config.json", "no JSON object"});
  refused_with([](json& q) { q["bits"] = 3; }, {"config.json", "3 bits"});
  refused_with([](json& q) { q["bits"] = "4"; }, {"\"4\" bits"});
  refused_with([](json& q) { q["bits"] = 8; }, {"_packed", "[16, 8]", "[16, 16]"});
  refused_with([](json& q) { q["group_size"] = 3; }, {"config.json", "16 columns", "groups of 3"});
  refused_with([](json& q) { q["group_size"] = -4; }, {"group_size", "-4"});
  refused_with([](json& q) { q["group_size"] = 1e300; }, {"group_size", "1e+300"});
  refused_with([](json& q) { q["group_size"] = 2; }, {"_scale", "[16, 4]", "[16, 8]"});
  refused_with([](json& q) { q["rotation_seed"] = -1; }, {"rotation_seed", "-1"});
  refused_with([](json& q) { q["method"] = 5; }, {"method", "5"});
  refused_with([](json& q) { q["tensors"] = "all"; }, {"list of tensors"});
  refused_with([](json& q) { q["tensors"] = json::array(); }, {"no tensors"});
  refused_with([](json& q) { q["tensors"] = {7}; }, {"names 7"});
  refused_with([](json& q) { q["tensors"] = {"q_proj", "k_proj"}; }, {"v_proj", "one matrix"});
  refused_with([](json& q) { q["tensors"] = {"o_proj", "router"}; }, {"router", "no weights of few bits"});
  refused_with([](json& q) { q["tensors"] = {"o_proj"}; }, {"no tensor", "q_proj.weight"});
  refused_with([](json& q) { q = nullptr; }, {"no tensor", "q_proj.weight"});
}

TEST_F(ExchangePacked, AConfigOfActivationsThatLiesIsRefused) {
  exported(made(routed(CausalMethod::Both), {.bits = 4, .activations = 8, .online = {.down = true}}));
  refused_with([](json& q) { q.erase("activation_bits"); }, {"config.json", "activations of null bits"});
  refused_with([](json& q) { q["activation_bits"] = 5; }, {"activations of 5 bits"});
  refused_with([](json& q) { q["activation_bits"] = "8"; }, {"activations of \"8\" bits"});
  refused_with([](json& q) { q["activation_clip"] = 0; }, {"activation_clip of 0"});
  refused_with([](json& q) { q["activation_clip"] = 1.5; }, {"activation_clip of 1.5"});
  refused_with([](json& q) { q["activation_clip"] = nullptr; }, {"activation_clip of null"});
  refused_with([](json& q) { q.erase("online_hadamards"); }, {"list of online_hadamards"});
  refused_with([](json& q) { q["online_hadamards"] = {"router"}; }, {"router", "online_hadamards"});
  refused_with([](json& q) { q["online_hadamards"] = {5}; }, {"5", "online_hadamards"});
  refused_with([](json& q) { q.erase("kv_bits"); }, {"keys and values of null bits"});
  refused_with([](json& q) { q["kv_bits"] = 5; }, {"config.json", "keys and values of 5 bits"});
  refused_with([](json& q) { q["bits"] = 16; }, {"names tensors of 16 bits"});
  refused_with([](json& q) { q["bits"] = 16, q["tensors"] = json::array(); },
               {"activations of 8 bits beside weights of 16"});
  refused_with([](json& q) { q["tensors"] = json::array(); }, {"names no tensors"});
}

// An older reader is told of another version, and reads what has no means.
TEST_F(ExchangePacked, MeansOfKeysComeBackToTheByte) {
  const auto version = [&] {
    return json::parse(read_bytes(folder_ / "m/config.json"))["quantization_config"]["version"].get<int>();
  };
  exported(made(routed(CausalMethod::Both), {.bits = 16, .kv = 4, .kinds = {}}));
  EXPECT_EQ(version(), 2);
  for (const int bits : {4, 8}) {
    const LoadedModel m =
        made(routed(CausalMethod::Both), {.bits = 16, .kv = bits, .key_means = true, .kinds = {}});
    const std::vector<float> zeros = logits(m);
    std::vector<float> means(8);  // [2, 4]
    for (std::int64_t layer = 0; layer < 4; ++layer) {
      for (std::size_t e = 0; e < means.size(); ++e)
        means[e] = 0.3F * static_cast<float>(layer + 1) - 0.17F * static_cast<float>(e);
      m.model->set_key_means(context_, layer, means);
    }
    EXPECT_NE(logits(m), zeros);
    exported(m);
    EXPECT_EQ(version(), 3);
    const SafetensorsFile file(folder_ / "m/model.safetensors");
    const SafetensorsEntry* entry = file.find("model.layers.3.self_attn.key_mean");
    ASSERT_NE(entry, nullptr);
    EXPECT_EQ(entry->type, SafetensorsType::F32);
    EXPECT_EQ(entry->shape, (std::vector<std::int64_t>{2, 4}));
    EXPECT_EQ(std::memcmp(file.data(entry->name).data(), means.data(), 32), 0);
    const LoadedModel back = loaded();
    EXPECT_EQ(*back.model->quantization(), *m.model->quantization());
    EXPECT_EQ(logits(back), logits(m));
    exported(back, "again");
    for (const char* name : {"/config.json", "/model.safetensors"})
      EXPECT_EQ(read_bytes(folder_ / ("m" + std::string(name))),
                read_bytes(folder_ / ("again" + std::string(name))));
  }
  // Of the weights' precision they are not.
  ExportOptions narrow;
  narrow.dtype = DType::BF16;
  export_model(loaded(), context_.backend(), folder_ / "bf16", narrow);
  EXPECT_EQ(
      SafetensorsFile(folder_ / "bf16/model.safetensors").find("model.layers.0.self_attn.key_mean")->type,
      SafetensorsType::F32);
}

TEST_F(ExchangePacked, MeansOfKeysThatLieAreRefused) {
  exported(made(by(CausalMethod::None), {.bits = 16, .kv = 4, .key_means = true, .kinds = {}}));
  refused_with([](json& q) { q.erase("key_means"); }, {"config.json", "key_means of null"});
  refused_with([](json& q) { q["key_means"] = 1; }, {"key_means of 1, not true or false"});
  refused_with([](json& q) { q["key_means"] = false; }, {"key_mean", "for which this model has no use"});
  refused_with([](json& q) { q["version"] = 2; }, {"key_mean", "for which this model has no use"});
  refused_with([](json& q) { q["kv_bits"] = 16; }, {"key_means beside keys of 16 bits"});
  const std::string name = "model.layers.2.self_attn.key_mean";
  using Entry = SafetensorsEntry;
  using Bytes = std::vector<std::byte>;
  refused_tensor(name, [](Entry& e, Bytes&) { e.name.clear(); }, {"no tensor", name});
  refused_tensor(name, [](Entry& e, Bytes&) { e.type = SafetensorsType::BF16; }, {name, "BF16", "F32"});
  refused_tensor(name, [](Entry& e, Bytes&) { e.shape = {8}; }, {name, "[8]", "[2, 4]"});
  refused_tensor(name, [](Entry& e, Bytes&) { e.shape = {4, 2}; }, {name, "[4, 2]", "[2, 4]"});
  refused_tensor(name, [](Entry& e, Bytes&) { e.shape = {0, 4}; }, {name, "[0, 4]"});
  for (const float mean : {NAN, INFINITY, -INFINITY}) {
    refused_tensor(name, [&](Entry&, Bytes& bytes) { std::memcpy(bytes.data() + 12, &mean, sizeof mean); },
                   {name, "without which no key is finite"});
  }
  EXPECT_FALSE(logits(loaded()).empty());
}

TEST(Quantization, RowsThatAreTooLongForCodesAreRefused) {
  const ParameterSpec longest{
      .name = "model.layers.0.mlp.down_proj.weight", .shape = {16, 65535}, .init = {}},
      longer{.name = longest.name, .shape = {16, 65536}, .init = {}};
  const Quantization codes{.activations = 8};
  EXPECT_EQ(codes.format(longest).columns, 65535);
  EXPECT_EQ(Quantization{}.format(longer).columns, 65536);
  try {
    codes.format(longer);
    ADD_FAILURE() << "no error";
  } catch (const UserError& e) {
    EXPECT_NE(std::string(e.what()).find("rows of 65536 columns"), std::string::npos) << e.what();
  }
}

TEST_F(ExchangePacked, TensorsThatLieAreRefused) {
  exported(made(routed(CausalMethod::Both), {.bits = 4, .group = 4}));
  const std::string name = "model.layers.2.mlp.up_proj.weight";
  using Entry = SafetensorsEntry;
  using Bytes = std::vector<std::byte>;
  refused_tensor(name + "_scale", [](Entry& e, Bytes&) { e.name.clear(); }, {"no tensor", name + "_scale"});
  refused_tensor(name + "_packed", [](Entry& e, Bytes&) { e.name.clear(); }, {"no tensor", name + "_packed"});
  refused_tensor(name + "_packed", [](Entry& e, Bytes&) { e.type = SafetensorsType::I8; },
                 {name + "_packed", "I8", "U8"});
  refused_tensor(name + "_scale", [](Entry& e, Bytes&) { e.type = SafetensorsType::F16; },
                 {name + "_scale", "F16", "F32"});
  refused_tensor(name + "_packed", [](Entry& e, Bytes&) { e.shape = {20, 7}; }, {"[20, 7]", "[20, 8]"});
  refused_tensor(name + "_scale", [](Entry& e, Bytes&) { e.shape = {80}; }, {"[80]", "[20, 4]"});
  refused_tensor(name + "_scale", [](Entry& e, Bytes&) { e.name += "s"; }, {"no tensor", name + "_scale"});
  for (const float scale : {NAN, INFINITY, -INFINITY, 1e38F}) {
    refused_tensor(name + "_scale",
                   [&](Entry&, Bytes& bytes) { std::memcpy(bytes.data() + 12, &scale, sizeof scale); },
                   {name + "_scale", "not finite"});
  }
  EXPECT_FALSE(logits(loaded()).empty());
}

// Whatever is changed: a model, or a refusal; nothing is read that is not there.
TEST_F(ExchangePacked, MutantsAreRefusedOrLoad) {
  exported(made(by(CausalMethod::None), {.bits = 4, .group = 4, .kv = 4, .key_means = true}));
  testing::Mutator mutator(5);
  std::int64_t refusals = 0;
  for (const char* name : {"m/config.json", "m/model.safetensors"}) {
    const std::string path = folder_ / name, good = read_bytes(path);
    const std::int64_t inputs = testing::fuzz_inputs(400);
    for (std::int64_t i = 0; i < inputs; ++i) {
      write_bytes(path, mutator.mutate(good));
      try {
        logits(loaded());
      } catch (const UserError&) {
        ++refusals;
      }
    }
    write_bytes(path, good);
  }
  EXPECT_GT(refusals, 100);
}

}  // namespace
}  // namespace fathom::model_test
