#include "src/io/prepare.h"

#include <algorithm>
#include <deque>
#include <filesystem>
#include <thread>
#include <utility>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/io/atomic_file.h"
#include "src/io/bin_reader.h"
#include "src/io/checksum.h"
#include "src/io/load_tokenizer.h"
#include "src/io/ordered_encoder.h"
#include "src/io/output_file.h"
#include "src/io/token_store.h"

namespace fathom {

namespace {

constexpr std::size_t kBatchBytes = std::size_t{1} << 18;

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

// The one store or the two that the documents go to.
class Stores {
 public:
  Stores(const PrepareOptions& options, const TokenStoreInfo& info)
      : options_(options), train_(options.output, side(info, "train")) {
    if (options.valid_fraction > 0) valid_.emplace(valid_path(options.output), side(info, "valid"));
  }

  // The store for a document with this content.
  TokenStoreWriter& choose(std::string_view content) {
    return valid_ && goes_to_valid(content, options_.valid_fraction) ? *valid_ : train_;
  }

  std::int64_t documents() const { return train_.num_documents() + (valid_ ? valid_->num_documents() : 0); }
  std::int64_t tokens() const { return train_.num_tokens() + (valid_ ? valid_->num_tokens() : 0); }

  PrepareResult commit() {
    if (documents() == 0) {
      throw UserError(fmt::format("there is no text in {}: the token store {} would be empty.",
                                  fmt::join(options_.inputs, ", "), options_.output),
                      "Give at least one document that is not empty.");
    }
    for (const TokenStoreWriter* store : {&train_, valid_ ? &*valid_ : &train_}) {
      if (store->num_documents() > 0) continue;
      throw UserError(
          fmt::format("--valid-fraction {} of {} documents leaves no {} document.", options_.valid_fraction,
                      documents(), store == &train_ ? "training" : "validation"),
          "Documents are split by a hash of their text. Give more documents, another fraction, or prepare a "
          "validation "
          "file of its own.");
    }
    PrepareResult result;
    result.train = summary(options_.output, train_);
    train_.finish();
    if (valid_) {
      result.valid = summary(valid_path(options_.output), *valid_);
      valid_->finish();
      // Two files cannot be replaced at once. A process that is killed from here on leaves a training store
      // without a validation store, which is noticed, and never one beside an earlier run's, which is not.
      remove_file(valid_path(options_.output));
    } else if (std::filesystem::exists(valid_path(options_.output))) {
      result.warning = fmt::format(
          "{} is from an earlier run and may share documents with the new {}; remove it or use "
          "--valid-fraction.",
          valid_path(options_.output), options_.output);
    }
    train_.commit();
    if (valid_) valid_->commit();
    return result;
  }

 private:
  TokenStoreInfo side(TokenStoreInfo info, const char* name) const {
    if (options_.valid_fraction > 0) {
      info.recipe += fmt::format(" split={} valid_fraction={}", name, options_.valid_fraction);
    }
    return info;
  }
  static PreparedStore summary(const std::string& path, const TokenStoreWriter& store) {
    return {path, store.num_documents(), store.num_tokens(), store.text_bytes()};
  }

  const PrepareOptions& options_;
  TokenStoreWriter train_;
  std::optional<TokenStoreWriter> valid_;
};

void report(const PrepareOptions& options, std::int64_t done, std::int64_t total, const Stores& stores) {
  if (options.on_progress) options.on_progress({done, total, stores.documents(), stores.tokens()});
}

PrepareResult prepare_text(const PrepareOptions& options) {
  const auto tokenizer = load_tokenizer(options.tokenizer);
  if (tokenizer->end_of_document() < 0) {
    throw UserError(fmt::format("{} has no token that is known to end a document.", options.tokenizer),
                    "docs/formats.md names those that are known.");
  }
  TextReader reader(options.inputs, options.text);
  Stores stores(options, describe(*tokenizer, "prepare"));
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  OrderedEncoder encoder(*tokenizer, std::max(1, options.threads > 0 ? options.threads : cores));

  // Reading runs ahead of writing: the progress is that of the text that was written.
  std::deque<std::int64_t> read_at_submit;
  const auto write_oldest = [&] {
    const EncodedBatch batch = encoder.take();
    const std::int64_t bytes_done = read_at_submit.front();
    read_at_submit.pop_front();
    for (std::size_t i = 0; i < batch.texts.size(); ++i) {
      stores.choose(batch.texts[i]).add_document(batch.ids[i], batch.texts[i]);
    }
    report(options, bytes_done, reader.bytes_total(), stores);
  };
  std::vector<std::string> texts;
  std::size_t bytes = 0;
  const auto submit = [&] {
    read_at_submit.push_back(reader.bytes_done());
    encoder.submit(std::exchange(texts, {}));
    bytes = 0;
    while (encoder.full()) write_oldest();
  };
  std::string document;
  while (reader.next(document)) {
    bytes += document.size();
    texts.push_back(std::move(document));
    if (bytes >= kBatchBytes) submit();
  }
  if (!texts.empty()) submit();
  while (!encoder.empty()) write_oldest();
  PrepareResult result = stores.commit();
  result.skipped = reader.skipped();
  return result;
}

void require_apart(const PrepareOptions& options) {
  std::vector<std::string> inputs = options.inputs;
  if (options.tokenizer != "bytes") inputs.push_back(options.tokenizer);
  require_no_input("-o", options.output, inputs);
  if (options.valid_fraction > 0) {
    require_no_input("the validation store", valid_path(options.output), inputs);
  }
}

PrepareResult prepare_bin(const PrepareOptions& options) {
  if (options.external_vocab < 1) {
    throw UsageError(
        fmt::format("{} holds token ids of another program, whose vocabulary's size is not known.",
                    options.inputs.front()),
        "Give --vocab-size: 50257 for GPT-2's tokenizer (llm.c, nanoGPT), 128256 for Llama 3's.");
  }
  TokenStoreInfo info;
  info.tokenizer_kind = "external";
  // The tokenizer is not known; what is known of it tells at least GPT-2's ids from Llama's.
  info.tokenizer_hash = fmt::format("external:{}:{}", options.external_vocab, options.external_end);
  info.vocab_size = options.external_vocab;
  info.end_of_document = options.external_end;
  info.recipe = "prepare bin";
  Stores stores(options, info);
  std::int64_t total = 0;
  for (const std::string& path : options.inputs) total += BinReader(path, options.external_end).bytes_total();
  std::int64_t before = 0;
  std::vector<std::int32_t> ids;
  for (const std::string& path : options.inputs) {
    BinReader reader(path, options.external_end);
    while (reader.next(ids)) {
      stores.choose({reinterpret_cast<const char*>(ids.data()), ids.size() * sizeof(ids[0])}).add_tokens(ids);
      report(options, before + reader.bytes_done(), total, stores);
    }
    before += reader.bytes_total();
  }
  return stores.commit();
}

}  // namespace

PrepareResult prepare(const PrepareOptions& options) {
  if (options.inputs.empty()) throw UsageError("there is no input.", "Give at least one text file.");
  if (!(options.valid_fraction >= 0 && options.valid_fraction < 1)) {
    throw UsageError(fmt::format("--valid-fraction {} is out of range.", options.valid_fraction),
                     "Give a share of the documents from 0 (no validation store) to below 1, such as 0.01.");
  }
  require_apart(options);
  const auto bins = std::count_if(options.inputs.begin(), options.inputs.end(), is_bin_file);
  if (bins == 0) return prepare_text(options);
  if (bins == static_cast<std::ptrdiff_t>(options.inputs.size())) return prepare_bin(options);
  throw UsageError("text and .bin files cannot go into one store: their ids mean different things.",
                   "Prepare them one by one.");
}

std::string valid_path(const std::string& output) {
  return (ends_with(output, ".h5") ? output.substr(0, output.size() - 3) : output) + ".valid.h5";
}

bool goes_to_valid(std::string_view document, double valid_fraction) {
  // The top 53 bits as a number in [0, 1).
  return static_cast<double>(checksum64(document) >> 11) * 0x1p-53 < valid_fraction;
}

}  // namespace fathom
