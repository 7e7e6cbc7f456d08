// config.json of a model in exchange, to and from Fathom's config. Private to src/model.
#pragma once

#include <optional>
#include <string>

#include "src/model/checkpoint.h"
#include "src/model/quantization.h"

namespace fathom {

/// "llama", "qwen3" (QK-norm) or "fathom" (routed).
std::string exchange_type(const Config& config);

/// The text of config.json. `quantization` may be null.
std::string exchange_config(const Config& config, const CheckpointMeta& meta, DType dtype,
                            const TextEnds& ends, const Quantization* quantization);

/// The text of generation_config.json, which is where programs look first for what ends a text.
std::string exchange_generation_config(const TextEnds& ends);

/// What config.json or generation_config.json says of them; of ids outside of the vocabulary nothing.
/// UserError of `path`: no JSON object, or something else than ids.
TextEnds parse_text_ends(const std::string& text, const std::string& path, std::int64_t vocab_size);

struct ExchangeConfig {
  Config config;        // data and train are placeholders
  CheckpointMeta meta;  // of an export; of other programs' models only config_yaml
  std::optional<Quantization> quantization;
  bool is_ours = false;
};

/// `path` names the file in errors. UserError: no JSON, a key that is missing or out of range, or a feature
/// that Fathom has not.
ExchangeConfig parse_exchange_config(const std::string& text, const std::string& path);

}  // namespace fathom
