#include "train/inputs.h"

#include <string>
#include <system_error>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/config/parse.h"
#include "src/config/resolve.h"
#include "src/core/units.h"
#include "src/io/atomic_file.h"
#include "src/io/load_tokenizer.h"
#include "src/model/model_tokenizer.h"

namespace fathom {

namespace {

std::shared_ptr<const TokenStore> open_store(const std::string& path, const char* key) {
  if (path.empty())
    throw UsageError(fmt::format("{} names no token store.", key), "Make one with fathom data prepare.");
  return std::make_shared<const TokenStore>(TokenStore::open(path));
}

DataLoader loader_of(const std::shared_ptr<const TokenStore>& store, const Config& config) {
  return DataLoader(store, config.train.seq_len, config.data.document_mask);
}

}  // namespace

TrainingInputs TrainingInputs::open(const Config& config) {
  const DataConfig& data = config.data;
  TrainingInputs inputs;
  inputs.train = open_store(data.train, "data.train");
  if (!data.valid.empty()) inputs.valid = open_store(data.valid, "data.valid");
  if (inputs.valid && inputs.valid->tokenizer_hash() != inputs.train->tokenizer_hash()) {
    throw UserError(fmt::format("data.valid ({}) was made with another tokenizer ({}) than data.train ({}).",
                                data.valid, inputs.valid->tokenizer_hash(), inputs.train->tokenizer_hash()),
                    "Prepare both with one tokenizer; --valid-fraction makes the pair.");
  }
  if (data.tokenizer == "bytes") {
    require_tokenizer(*inputs.train, ByteTokenizer(), data.tokenizer);
  } else if (!data.tokenizer.empty()) {
    inputs.tokenizer_model = read_file(data.tokenizer, "tokenizer");
    require_tokenizer(*inputs.train, *make_tokenizer(inputs.tokenizer_model, data.tokenizer), data.tokenizer);
  }
  inputs.config = resolve(config, inputs.train->vocab_size());
  validate(inputs.config);
  return inputs;
}

DataLoader TrainingInputs::train_loader() const { return loader_of(train, config); }

std::optional<DataLoader> TrainingInputs::valid_loader() const {
  if (!valid) return std::nullopt;
  return loader_of(valid, config);
}

Config with_own_tokenizer(Config config, const std::filesystem::path& run) {
  std::string& tokenizer = config.data.tokenizer;
  std::error_code error;
  if (tokenizer.empty() || tokenizer == "bytes" || std::filesystem::exists(tokenizer, error)) return config;
  for (const char* name : {kTokenizerCopy, kTokenizerJson}) {
    if (!std::filesystem::exists(run / name, error)) continue;
    tokenizer = (run / name).string();
    break;
  }
  return config;
}

std::string data_line(const TrainingInputs& inputs, std::int64_t steps) {
  const auto text = static_cast<double>(inputs.train->num_tokens());
  const double passes =
      static_cast<double>(steps) * static_cast<double>(inputs.config.train.batch_tokens) / text;
  std::string line =
      fmt::format("Data: {} tokens; this run makes {:.2f} passes over them.", format_count(text), passes);
  if (passes > kManyPasses) {
    line += fmt::format(
        " More than {:.0f} teach less than fresh text would: watch the validation loss, or give more text.",
        kManyPasses);
  }
  return line;
}

}  // namespace fathom
