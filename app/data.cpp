// fathom data: text to token stores, what a store holds, and synthetic text.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "app/command.h"
#include "app/progress.h"
#include "kernels/error.h"
#include "src/core/stopwatch.h"
#include "src/core/units.h"
#include "src/io/load_tokenizer.h"
#include "src/io/prepare.h"
#include "src/io/synthetic_text.h"
#include "src/io/token_store.h"

namespace fathom::app {

namespace {

struct PrepareFlags {
  PrepareOptions options;
  std::string invalid_utf8 = "error";
};

nlohmann::json to_json(const PreparedStore& store) {
  return {{"path", store.path},
          {"documents", store.documents},
          {"tokens", store.tokens},
          {"text_bytes", store.text_bytes},
          {"file_bytes", std::filesystem::file_size(store.path)}};
}

void print_store(const char* side, const PreparedStore& store) {
  fmt::print("{:<6} {}: {} documents, {} tokens", side, store.path, with_commas(store.documents),
             with_commas(store.tokens));
  if (store.text_bytes > 0) {
    fmt::print(", {} of text ({:.2f} bytes a token)", format_bytes(static_cast<double>(store.text_bytes)),
               static_cast<double>(store.text_bytes) / static_cast<double>(store.tokens));
  }
  fmt::print("\n");
}

void run_prepare(PrepareFlags& flags, const Globals& globals) {
  PrepareOptions& options = flags.options;
  options.text.invalid_utf8 = parse_invalid_utf8(flags.invalid_utf8);
  options.threads = globals.threads;
  const Stopwatch watch;
  PrepareResult result;
  {
    Progress progress("preparing");
    options.on_progress = [&](const PrepareProgress& p) {
      if (!progress.due()) return;
      progress.update(
          p.bytes_done, p.bytes_total,
          fmt::format("{} documents, {} tokens", with_commas(p.documents), with_commas(p.tokens)));
    };
    result = prepare(options);
  }
  const double seconds = watch.seconds();
  if (!result.warning.empty()) fmt::print(stderr, "warning: {}\n", result.warning);
  if (globals.json) {
    nlohmann::json out = {
        {"train", to_json(result.train)}, {"skipped", result.skipped}, {"seconds", seconds}};
    if (result.valid) out["valid"] = to_json(*result.valid);
    if (!result.warning.empty()) out["warning"] = result.warning;
    fmt::print("{}\n", out.dump());
    return;
  }
  print_store(result.valid ? "train" : "store", result.train);
  if (result.valid) print_store("valid", *result.valid);
  if (result.skipped > 0)
    fmt::print("left out {} documents with invalid UTF-8\n", with_commas(result.skipped));
  fmt::print("done in {:.1f} s\n", seconds);
}

struct InspectFlags {
  std::string store;
  std::string tokenizer;
  std::int64_t show = 64;
};

void run_inspect(const InspectFlags& flags, const Globals& globals) {
  const TokenStore store = TokenStore::open(flags.store);
  const TokenStoreInfo& info = store.info();
  std::vector<std::int32_t> first(
      static_cast<std::size_t>(std::clamp<std::int64_t>(flags.show, 0, store.num_tokens())));
  store.read(0, first);
  std::unique_ptr<Tokenizer> tokenizer;
  if (!flags.tokenizer.empty() || store.is_bytes()) {
    const std::string from = flags.tokenizer.empty() ? "bytes" : flags.tokenizer;
    tokenizer = load_tokenizer(from);
    require_tokenizer(store, *tokenizer, from);
  }
  // What lies at the end may be half a character: it is shown as an escape.
  const std::string text = tokenizer ? escape_text(tokenizer->decode(first)) : "";
  const auto starts = store.document_starts();
  std::int64_t longest = 0;
  for (std::size_t i = 1; i < starts.size(); ++i) longest = std::max(longest, starts[i] - starts[i - 1]);
  if (globals.json) {
    nlohmann::json out = {{"path", store.path()},
                          {"tokens", store.num_tokens()},
                          {"documents", store.num_documents()},
                          {"longest_document", longest},
                          {"text_bytes", store.text_bytes()},
                          {"file_bytes", std::filesystem::file_size(store.path())},
                          {"vocab_size", info.vocab_size},
                          {"tokenizer", info.tokenizer_kind},
                          {"tokenizer_hash", info.tokenizer_hash},
                          {"end_of_document", info.end_of_document},
                          {"bos", info.bos},
                          {"recipe", info.recipe},
                          {"source_hash", store.source_hash()},
                          {"content_hash", store.content_hash()},
                          {"first_tokens", first}};
    if (tokenizer) out["first_text"] = text;
    fmt::print("{}\n", out.dump());
    return;
  }
  const auto line = [](const char* name, const std::string& value) {
    fmt::print("{:<16} {}\n", name, value);
  };
  line("store", store.path());
  line("tokens", with_commas(store.num_tokens()));
  line("documents",
       fmt::format("{} (the longest: {} tokens)", with_commas(store.num_documents()), with_commas(longest)));
  line("text",
       store.text_bytes() == 0
           ? "unknown"
           : fmt::format("{} ({:.2f} bytes a token)", format_bytes(static_cast<double>(store.text_bytes())),
                         static_cast<double>(store.text_bytes()) / static_cast<double>(store.num_tokens())));
  line("vocabulary", fmt::format("{} ({}, hash {})", with_commas(info.vocab_size), info.tokenizer_kind,
                                 info.tokenizer_hash));
  line("end of document", info.end_of_document < 0 ? "none" : std::to_string(info.end_of_document));
  line("made by", info.recipe);
  line("source hash", store.source_hash());
  line("content hash", store.content_hash());
  line("first tokens", fmt::format("{}", fmt::join(first, " ")));
  if (tokenizer) line("first text", text);
}

struct SyntheticFlags {
  std::string output;
  std::int64_t bytes = 1000000;
  std::uint64_t seed = 1;
};

void run_synthetic(const SyntheticFlags& flags, const Globals& globals) {
  const std::int64_t documents = write_synthetic_text(flags.output, flags.bytes, flags.seed);
  const auto size = static_cast<std::int64_t>(std::filesystem::file_size(flags.output));
  if (globals.json) {
    fmt::print("{}\n",
               nlohmann::json{{"path", flags.output}, {"documents", documents}, {"bytes", size}}.dump());
  } else {
    fmt::print("{}: {} documents, {}\n", flags.output, with_commas(documents),
               format_bytes(static_cast<double>(size)));
  }
}

void add_prepare(CLI::App& data, Globals& globals) {
  CLI::App* sub = data.add_subcommand("prepare", "Turn text into a token store");
  add_global_flags(*sub, globals);
  auto flags = std::make_shared<PrepareFlags>();
  PrepareOptions& o = flags->options;
  sub->add_option(
         "IN", o.inputs,
         "Text files; .jsonl files with a \"text\" a line; .gz, .xz or .zst of either; or .bin files of "
         "llm.c and nanoGPT")
      ->required();
  sub->add_option("-o,--output", o.output, "The token store to write, for example books.h5")->required();
  sub->add_option("--tokenizer", o.tokenizer, "bytes, or a model of fathom tokenizer train")
      ->capture_default_str();
  sub->add_option("--valid-fraction", o.valid_fraction,
                  "Share of the documents that goes to a validation store beside the other (books.valid.h5)")
      ->capture_default_str();
  sub->add_option("--invalid-utf8", flags->invalid_utf8, "error | replace (by U+FFFD) | skip (the document)")
      ->capture_default_str();
  sub->add_option("--field", o.text.field, "The field of JSON lines that holds the text")
      ->capture_default_str();
  sub->add_option("--vocab-size", o.external_vocab, ".bin: the vocabulary's size (GPT-2: 50257)");
  sub->add_option("--end-of-document", o.external_end,
                  ".bin: the id between documents (GPT-2: 50256); -1: none")
      ->capture_default_str();
  sub->footer(
      "Examples:\n"
      "  fathom data prepare book.txt --tokenizer bytes --valid-fraction 0.05 -o book.h5\n"
      "  fathom data prepare part-*.jsonl.xz --tokenizer bpe.model --valid-fraction 0.01 -o web.h5\n"
      "  fathom data prepare train.bin --vocab-size 50257 --end-of-document 50256 -o gpt2.h5\n"
      "Documents are split by a hash of their text: equal documents never end up on both sides. The store "
      "holds no\n"
      "dates and no paths: equal input gives equal bytes.");
  sub->callback([flags, &globals] { run_prepare(*flags, globals); });
}

void add_inspect(CLI::App& data, Globals& globals) {
  CLI::App* sub = data.add_subcommand("inspect", "Show what a token store holds, after verifying it");
  add_global_flags(*sub, globals);
  auto flags = std::make_shared<InspectFlags>();
  sub->add_option("STORE", flags->store, "A token store")->required();
  sub->add_option("--tokenizer", flags->tokenizer, "Decode with this model (a byte store needs none)");
  sub->add_option("--show", flags->show, "Show this many tokens from the start")
      ->capture_default_str()
      ->check(number_from_to(0, 1e15));
  sub->footer("Example:\n  fathom data inspect book.h5");
  sub->callback([flags, &globals] { run_inspect(*flags, globals); });
}

void add_synthetic(CLI::App& data, Globals& globals) {
  CLI::App* sub =
      data.add_subcommand("synthetic", "Write synthetic English-like text that a small model can learn");
  add_global_flags(*sub, globals);
  auto flags = std::make_shared<SyntheticFlags>();
  sub->add_option("-o,--output", flags->output, "The file to write; a document a line if it ends in .jsonl")
      ->required();
  sub->add_option("--bytes", flags->bytes, "At least this much text")->capture_default_str();
  sub->add_option("--seed", flags->seed, "Equal seeds give equal text")->capture_default_str();
  sub->footer("Example:\n  fathom data synthetic -o stories.jsonl --bytes 1000000 --seed 1");
  sub->callback([flags, &globals] { run_synthetic(*flags, globals); });
}

}  // namespace

void add_data(CLI::App& app, Globals& globals) {
  CLI::App* data = app.add_subcommand("data", "Text to token stores, and what they hold");
  data->require_subcommand(1);
  data->footer(
      "Examples:\n"
      "  fathom data prepare book.txt --valid-fraction 0.05 -o book.h5\n"
      "  fathom data inspect book.h5");
  add_prepare(*data, globals);
  add_inspect(*data, globals);
  add_synthetic(*data, globals);
}

}  // namespace fathom::app
