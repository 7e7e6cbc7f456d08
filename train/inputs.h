// What a training reads, opened and checked: the stores against each other and the tokenizer, and the config
// that they resolve.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "src/config/config.h"
#include "src/io/token_store.h"
#include "train/data_loader.h"

namespace fathom {

struct TrainingInputs {
  Config config;  // resolved: the training store gave it its vocabulary
  std::shared_ptr<const TokenStore> train;
  std::shared_ptr<const TokenStore> valid;  // null: no evaluation
  std::string tokenizer_model;              // the file's bytes; empty: none is named, or it is no file

  /// `config` is as read from its file. UserError: a store or the tokenizer is missing, damaged, or does not
  /// go with the others. UsageError: no training store is named, or the resolved config is out of range.
  static TrainingInputs open(const Config& config);

  /// UserError when the store is shorter than a sequence.
  DataLoader train_loader() const;
  std::optional<DataLoader> valid_loader() const;  // empty: no evaluation
};

/// `config` for the run in the folder `run`: where the file that data.tokenizer names is gone, the run's own
/// copy (src/model/model_tokenizer.h) takes its place, if there is one. TrainingInputs::open then checks it
/// against the stores, as any other.
Config with_own_tokenizer(Config config, const std::filesystem::path& run);

/// More passes than this over a text teach less than fresh text would (Muennighoff et al. 2023).
inline constexpr double kManyPasses = 4.0;

/// "Data: 37.6M tokens; this run makes 2.3 passes over them.", and what to think of many.
std::string data_line(const TrainingInputs& inputs, std::int64_t steps);

}  // namespace fathom
