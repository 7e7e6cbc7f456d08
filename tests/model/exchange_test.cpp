#include "src/model/exchange.h"

#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <thread>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

#include "kernels/error.h"
#include "src/config/resolve.h"
#include "src/io/atomic_file.h"
#include "src/io/safetensors.h"
#include "tests/io/temp.h"
#include "tests/model/small_model.h"

namespace fathom::model_test {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::expect_user_error;
using testing::read_bytes;
using testing::TempFolder;
using testing::write_bytes;

using Values = std::map<std::string, std::vector<float>>;

class Exchange : public ::testing::Test {
 protected:
  LoadedModel made(const ModelConfig& model, const RoutingConfig& routing = by(CausalMethod::None)) {
    LoadedModel m;
    m.config.model = model;
    m.config.routing = routing;
    m.config = resolve(m.config);
    m.meta.tokenizer_kind = m.meta.tokenizer_hash = "bytes";
    m.meta.state.step = 12;
    m.model = std::make_unique<Transformer>(context_, m.config.model, m.config.routing, true);
    m.model->initialise(context_, 5);
    return m;
  }
  Values values(const LoadedModel& m) {
    Values all;
    for (const ParameterSpec& spec : m.model->parameters().specs()) {
      all[spec.name] = to_host<float>(context_.backend(), m.model->parameters().master(spec.name));
    }
    return all;
  }
  LoadedModel loaded(const std::string& path) {
    return load_model(path, [&](const Config&) -> Context& { return context_; });
  }
  Exported exported(const LoadedModel& m, const ExportOptions& options = {}) {
    return export_model(m, context_.backend(), folder_ / "m", options);
  }
  void refused(std::initializer_list<std::string> words) {
    expect_user_error([&] { loaded(folder_ / "m"); }, words);
  }
  /// config.json of folder m, with a change.
  void change_config(const std::function<void(json&)>& change) {
    json config = json::parse(read_bytes(folder_ / "m/config.json"));
    change(config);
    write_bytes(folder_ / "m/config.json", config.dump());
  }

  TempFolder folder_;
  Context context_{make_cpu_backend({}), DType::F32};
};

ModelConfig grouped(bool qk_norm, bool tied) {
  ModelConfig m = small_config();
  m.kv_heads = 2;
  m.qk_norm = qk_norm;
  m.tie_embeddings = tied;
  return m;
}

/// Heads that do not divide the width among them.
ModelConfig wide(ModelConfig m) {
  m.own_head_dim = 10;
  return m;
}

TEST_F(Exchange, EveryKindComesBackAsItWas) {
  struct Kind {
    ModelConfig model;
    RoutingConfig routing;
    std::string type;
  };
  const std::vector<Kind> kinds = {
      {small_config(), by(CausalMethod::None), "llama"},
      {grouped(false, true), by(CausalMethod::None), "llama"},
      {grouped(true, false), by(CausalMethod::None), "qwen3"},
      {wide(grouped(true, false)), by(CausalMethod::None), "qwen3"},
      {wide(grouped(false, true)), routed(CausalMethod::Both), "fathom"},
      {small_config(), routed(CausalMethod::Aux, Gate::Tanh, 0.5), "fathom"},
      {grouped(true, true), routed(CausalMethod::Both), "fathom"},
      {small_config(), with_experts(by(CausalMethod::Predictor), RoutingKind::Moe), "fathom"},
      {small_config(), tokens_choose(by(CausalMethod::None), RoutingKind::Moe, 2, 1.25), "fathom"},
      {small_config(), with_experts(routed(CausalMethod::Predictor), RoutingKind::ModeStaged), "fathom"},
      {small_config(), with_experts(by(CausalMethod::Predictor), RoutingKind::ModeIntegrated), "fathom"}};
  for (const Kind& kind : kinds) {
    SCOPED_TRACE(kind.type);
    const LoadedModel m = made(kind.model, kind.routing);
    EXPECT_EQ(exported(m).model_type, kind.type);
    const LoadedModel back = loaded(folder_ / "m");
    EXPECT_EQ(back.config.model, m.config.model);
    // A dense model's routing keys mean nothing, and are not written.
    const RoutingConfig expected = kind.type == "fathom" ? m.config.routing : RoutingConfig();
    EXPECT_EQ(back.config.routing.kind, expected.kind);
    if (kind.type == "fathom") {
      EXPECT_EQ(back.config.routing, expected);
    }
    EXPECT_EQ(values(back), values(m));
    EXPECT_EQ(back.meta.tokenizer_kind, "bytes");
    EXPECT_EQ(back.meta.state.step, 12);
  }
}

TEST_F(Exchange, NamesAreTheFieldsOwn) {
  const LoadedModel m = made(grouped(true, false));
  exported(m);
  const SafetensorsFile file(folder_ / "m/model.safetensors");
  const Values own = values(m);
  const std::vector<float>& qkv = own.at("model.layers.1.self_attn.qkv_proj.weight");
  const std::int64_t d = m.config.model.head_dim(), width = m.config.model.width;
  const auto expect_rows = [&](const std::string& name, std::int64_t begin, std::int64_t rows) {
    const SafetensorsEntry* entry = file.find("model.layers.1.self_attn." + name);
    ASSERT_NE(entry, nullptr) << name;
    EXPECT_EQ(entry->shape, (std::vector<std::int64_t>{rows, width}));
    EXPECT_EQ(std::memcmp(file.data(entry->name).data(), qkv.data() + begin * width, entry->bytes()), 0)
        << name;
  };
  expect_rows("q_proj.weight", 0, 4 * d);
  expect_rows("k_proj.weight", 4 * d, 2 * d);
  expect_rows("v_proj.weight", 6 * d, 2 * d);
  for (const char* name : {"model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight",
                           "model.layers.0.self_attn.q_norm.weight", "lm_head.weight"}) {
    EXPECT_NE(file.find(name), nullptr) << name;
  }
  const json config = json::parse(read_bytes(folder_ / "m/config.json"));
  EXPECT_EQ(config.at("architectures"), json({"Qwen3ForCausalLM"}));
  EXPECT_EQ(config.at("num_key_value_heads"), 2);
  EXPECT_EQ(config.at("eos_token_id"), 256);
}

TEST_F(Exchange, Bf16IsTheNearest) {
  const LoadedModel m = made(small_config());
  EXPECT_EQ(exported(m, {.dtype = DType::BF16, .tokenizer = ""}).bytes,
            2.0 * static_cast<double>(m.model->parameters().count()));
  const Values before = values(m), after = values(loaded(folder_ / "m"));
  for (const auto& [name, all] : before) {
    for (std::size_t i = 0; i < all.size(); ++i) {
      const float x = all[i], y = after.at(name)[i];
      EXPECT_EQ(std::bit_cast<std::uint32_t>(y) & 0xffffU, 0U);
      EXPECT_LE(std::abs(x - y), std::ldexp(std::abs(x), -8)) << name;
    }
  }
}

// As other programs write large models: several files and an index, in half precision, with tensors of no
// use.
TEST_F(Exchange, ShardsAndHalvesAreRead) {
  const LoadedModel m = made(grouped(false, true));
  exported(m);
  const Values before = values(m);
  {
    const SafetensorsFile whole(folder_ / "m/model.safetensors");
    json map = json::object();
    for (const int shard : {0, 1}) {
      std::vector<SafetensorsEntry> entries;
      for (std::size_t i = 0; i < whole.entries().size(); ++i) {
        if (static_cast<int>(i % 2) == shard) entries.push_back(whole.entries()[i]);
      }
      for (SafetensorsEntry& entry : entries) entry.type = SafetensorsType::F16;
      if (shard == 0)
        entries.push_back({"model.layers.0.self_attn.rotary_emb.inv_freq", SafetensorsType::F32, {2}});
      if (shard == 0) entries.push_back({"lm_head.weight", SafetensorsType::F32, {1}});
      const std::string name = "part-" + std::to_string(shard) + ".safetensors";
      SafetensorsWriter out(folder_ / ("m/" + name), entries);
      for (const SafetensorsEntry& entry : entries) {
        // One, and minus a half, and the smallest: the first three elements of each; then zeros.
        std::vector<std::uint16_t> halves(entry.bytes() / 2);
        if (entry.type == SafetensorsType::F16) halves[0] = 0x3c00, halves[1] = 0xb800, halves[2] = 1;
        out.write(entry.name, std::as_bytes(std::span(halves)));
        map[entry.name] = name;
      }
      out.commit();
    }
    write_bytes(folder_ / "m/model.safetensors.index.json", json{{"weight_map", map}}.dump());
  }
  fs::remove(folder_ / "m/model.safetensors");
  const Values after = values(loaded(folder_ / "m"));
  ASSERT_EQ(after.size(), before.size());
  const std::vector<float>& norm = after.at("model.norm.weight");
  EXPECT_EQ(norm[0], 1.0F);
  EXPECT_EQ(norm[1], -0.5F);
  EXPECT_EQ(norm[2], std::ldexp(1.0F, -24));
  EXPECT_EQ(norm[3], 0.0F);
  write_bytes(folder_ / "m/model.safetensors.index.json", R"({"weight_map":{"a":"../model.safetensors"}})");
  refused({"index.json", "../model.safetensors", "no file of its folder"});
  write_bytes(folder_ / "m/model.safetensors.index.json", "[]");
  refused({"index.json", "weight_map"});
}

TEST_F(Exchange, WhatFathomHasNotIsNamed) {
  exported(made(small_config()));
  const std::string good = read_bytes(folder_ / "m/config.json");
  const auto refused_with = [&](const std::function<void(json&)>& change,
                                std::initializer_list<std::string> words) {
    write_bytes(folder_ / "m/config.json", good);
    change_config(change);
    refused(words);
  };
  refused_with([](json& c) { c["model_type"] = "gpt2"; }, {"config.json", "gpt2"});
  refused_with([](json& c) { c["hidden_act"] = "gelu"; }, {"hidden_act", "gelu", "silu"});
  refused_with([](json& c) { c["attention_bias"] = true; }, {"attention_bias", "true"});
  refused_with([](json& c) { c["head_dim"] = 8; }, {"self_attn.q_proj.weight", "[16, 16]", "[32, 16]"});
  refused_with([](json& c) { c["head_dim"] = 7; }, {"model.head_dim", "7", "even"});
  refused_with([](json& c) { c["head_dim"] = "wide"; }, {"config.json", "model.head_dim"});
  refused_with(
      [](json& c) {
        c["rope_scaling"] = {{"rope_type", "llama3"}, {"factor", 8.0}};
      },
      {"rope_scaling", "llama3", "low_freq_factor"});
  refused_with(
      [](json& c) {
        c["rope_scaling"] = {{"type", "linear"}};
      },
      {"rope_scaling", "linear", "factor"});
  refused_with(
      [](json& c) {
        c["rope_scaling"] = {{"type", "linear"}, {"factor", 0.5}};
      },
      {"model.rope_scaling.factor", "0.5"});
  for (const char* kind : {"dynamic", "longrope"}) {
    refused_with(
        [&](json& c) {
          c["rope_scaling"] = {{"rope_type", kind}, {"factor", 2.0}};
        },
        {"rope_scaling", kind, "llama3"});
  }
  refused_with(
      [](json& c) {
        c["rope_parameters"] = {{"partial_rotary_factor", 0.5}};
      },
      {"partial_rotary_factor", "0.5"});
  refused_with([](json& c) { c["rope_parameters"] = {{"rope_type", "yarn"}}; }, {"rope_parameters", "yarn"});
  refused_with([](json& c) { c.erase("hidden_size"); }, {"hidden_size"});
  refused_with([](json& c) { c["hidden_size"] = "16"; }, {"hidden_size"});
  refused_with([](json& c) { c["hidden_size"] = -16, c.erase("head_dim"); },
               {"config.json", "model.width", "-16"});
  refused_with([](json& c) { c["rope_theta"] = "x"; }, {"config.json", "model.rope_theta"});
  refused_with([](json& c) { c.erase("model_type"); }, {"model_type"});
  refused_with([](json& c) { c["hidden_size"] = 32, c["head_dim"] = 8; },
               {"model.embed_tokens.weight", "[23, 16]", "[23, 32]"});
  refused_with([](json& c) { c["num_hidden_layers"] = 5; }, {"no tensor", "model.layers.4."});
  refused_with([](json& c) { c["num_hidden_layers"] = 3; }, {"model.layers.3.", "no use"});
  refused_with([](json& c) { c["fathom"]["version"] = 7; }, {"version 7", "reads version 1"});
  refused_with([](json& c) { c["model_type"] = "fathom"; }, {"fathom_routing"});
  refused_with([](json& c) { c["model_type"] = "fathom", c["fathom"]["version"] = 2; },
               {"version 2", "reads version 1"});
  write_bytes(folder_ / "m/config.json", "{");
  refused({"config.json", "no JSON"});
  write_bytes(folder_ / "m/config.json", good);
  change_config([](json& c) { c["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 5000.0}}; });
  EXPECT_EQ(loaded(folder_ / "m").config.model.rope_theta, 5000.0);
}

// Whoever looks while an export is replaced finds one.
TEST_F(Exchange, AnExportIsReplacedInOneStep) {
  const LoadedModel m = made(small_config());
  exported(m);
  std::atomic<bool> is_done{false};
  std::atomic<int> missing{0}, looks{0};
  std::thread onlooker([&] {
    const std::string config = folder_ / "m/config.json";
    for (; !is_done; ++looks) missing += ::access(config.c_str(), R_OK) == 0 ? 0 : 1;
  });
  for (int i = 0; i < 100; ++i) exported(m);
  is_done = true;
  onlooker.join();
  EXPECT_GT(looks, 100);
  EXPECT_EQ(missing, 0);
  for (const auto& entry : fs::directory_iterator(folder_.path())) EXPECT_EQ(entry.path().filename(), "m");
}

TEST_F(Exchange, ScaledPositionsComeBack) {
  ModelConfig m = grouped(false, false);
  m.rope_scaling = {RopeScalingKind::Llama3, 32.0, 1.5, 4.5, 64};
  exported(made(m));
  EXPECT_EQ(json::parse(read_bytes(folder_ / "m/config.json")).at("rope_scaling"),
            json({{"rope_type", "llama3"},
                  {"factor", 32.0},
                  {"low_freq_factor", 1.5},
                  {"high_freq_factor", 4.5},
                  {"original_max_position_embeddings", 64}}));
  EXPECT_EQ(loaded(folder_ / "m").config.model.rope_scaling, m.rope_scaling);
  // As transformers writes it since version 5.
  change_config([](json& c) {
    c["rope_parameters"] = c["rope_scaling"];
    c["rope_parameters"]["rope_theta"] = 500.0;
    c.erase("rope_scaling");
    c.erase("rope_theta");
  });
  EXPECT_EQ(loaded(folder_ / "m").config.model.rope_scaling, m.rope_scaling);
  EXPECT_EQ(loaded(folder_ / "m").config.model.rope_theta, 500.0);
  m.rope_scaling = {RopeScalingKind::Linear, 4.0};
  const RoutingConfig routing = routed(CausalMethod::Aux);
  exported(made(m, routing));
  EXPECT_EQ(loaded(folder_ / "m").config.model.rope_scaling, m.rope_scaling);
  change_config([](json& c) { c["rope_scaling"] = {{"type", "linear"}, {"factor", 2}}; });
  EXPECT_EQ(loaded(folder_ / "m").config.model.rope_scaling.factor, 2.0);
}

TEST_F(Exchange, WhatIsThereIsKept) {
  const LoadedModel m = made(small_config());
  fs::create_directories(folder_ / "m");
  write_bytes(folder_ / "m/thesis.txt", "mine");
  expect_user_error([&] { exported(m); }, {"/m", "not replaced"});
  EXPECT_EQ(read_bytes(folder_ / "m/thesis.txt"), "mine");
  // Nor what somebody put beside an export, nor anybody else's config.json or model.
  write_bytes(folder_ / "m/config.json", R"({"name":"my project"})");
  EXPECT_THROW(exported(m), UserError);
  fs::remove(folder_ / "m/thesis.txt");
  EXPECT_THROW(exported(m), UserError);
  EXPECT_EQ(read_bytes(folder_ / "m/config.json"), R"({"name":"my project"})");
  fs::remove_all(folder_ / "m");
  exported(m);
  write_bytes(folder_ / "m/thesis.txt", "mine");
  EXPECT_THROW(exported(m), UserError);
  EXPECT_EQ(read_bytes(folder_ / "m/thesis.txt"), "mine");
  fs::remove(folder_ / "m/thesis.txt");
  change_config([](json& c) { c.erase("fathom"); });  // as of another program
  EXPECT_THROW(exported(m), UserError);
  fs::remove_all(folder_ / "m");
  exported(m);
  LoadedModel other = made(small_config(), routed(CausalMethod::Aux));
  exported(other);  // an export is replaced
  EXPECT_EQ(loaded(folder_ / "m").config.routing.kind, RoutingKind::Mod);
  other.meta.tokenizer_kind = "sentencepiece";
  other.meta.tokenizer_hash = "0";
  other.checkpoint = folder_ / "run/checkpoints/step_00000012.h5";
  EXPECT_THROW(exported(other), UserError);  // its tokenizer is nowhere
  EXPECT_EQ(values(loaded(folder_ / "m")), values(other));
  for (const auto& entry : fs::directory_iterator(folder_.path())) EXPECT_EQ(entry.path().filename(), "m");
}

}  // namespace
}  // namespace fathom::model_test
