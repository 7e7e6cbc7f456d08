// config.json of a model in exchange, to and from Fathom's config. Private to src/model.
#pragma once

#include <string>

#include "src/model/checkpoint.h"

namespace fathom {

/// "llama", "qwen3" (QK-norm) or "fathom" (routed).
std::string exchange_type(const Config& config);

/// The text of config.json. `end_of_document` and `bos` are the tokenizer's; negative: none.
std::string exchange_config(const Config& config, const CheckpointMeta& meta, DType dtype,
                            std::int64_t end_of_document, std::int64_t bos);

struct ExchangeConfig {
  Config config;        // data and train are placeholders
  CheckpointMeta meta;  // of an export; of other programs' models only config_yaml
  bool is_ours = false;
};

/// `path` names the file in errors. UserError: no JSON, a key that is missing or out of range, or a feature
/// that Fathom has not.
ExchangeConfig parse_exchange_config(const std::string& text, const std::string& path);

}  // namespace fathom
