// fathom tokenizer: training of SentencePiece models, and what a tokenizer does to a text.
#include "src/io/tokenizer.h"

#include <algorithm>
#include <memory>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "app/command.h"
#include "app/progress.h"
#include "kernels/error.h"
#include "src/core/stopwatch.h"
#include "src/core/units.h"
#include "src/io/atomic_file.h"
#include "src/io/load_tokenizer.h"
#include "src/io/output_file.h"
#include "src/io/sentencepiece_tokenizer.h"
#include "src/io/text_reader.h"

namespace fathom::app {

namespace {

struct TrainFlags {
  std::vector<std::string> inputs;
  std::string output;
  std::string invalid_utf8 = "error";
  TextReaderOptions text;
  SentencePieceTraining training;
  double sample_mb = 20;
};

void run_train(TrainFlags& flags, const Globals& globals) {
  flags.text.invalid_utf8 = parse_invalid_utf8(flags.invalid_utf8);
  if (!(flags.sample_mb > 0 && flags.sample_mb < 1e6)) {
    throw UsageError(fmt::format("--sample-mb {} is out of range.", flags.sample_mb),
                     "Give megabytes of text, such as 20.");
  }
  flags.training.sample_bytes = static_cast<std::int64_t>(flags.sample_mb * 1e6);
  require_no_input("-o", flags.output, flags.inputs);
  require_replaceable(flags.output, "a tokenizer model", is_sentencepiece_file);
  AtomicFile out(flags.output);  // an unwritable place is reported before the work, not after it
  TextReader reader(flags.inputs, flags.text);
  const Stopwatch watch;
  std::string model;
  {
    Progress progress("reading");
    flags.training.on_text = [&](std::int64_t bytes) {
      progress.update(reader.bytes_done(), reader.bytes_total(),
                      format_bytes(static_cast<double>(bytes)) + " of text");
    };
    flags.training.on_train = [&] {
      if (!globals.json)
        fmt::print(stderr, "training {} tokens on a sample of the text\n", flags.training.vocab_size);
    };
    model = train_sentencepiece([&](std::string& document) { return reader.next(document); }, flags.training);
  }
  const auto tokenizer = make_sentencepiece(model, flags.output);
  out.write(model);
  out.commit();
  const double seconds = watch.seconds();
  if (globals.json) {
    fmt::print("{}\n", nlohmann::json{{"path", flags.output},
                                      {"vocab_size", tokenizer->vocab_size()},
                                      {"hash", tokenizer->hash()},
                                      {"seconds", seconds}}
                           .dump());
  } else {
    fmt::print("{}: {} tokens, hash {}, {:.1f} s\n", flags.output, with_commas(tokenizer->vocab_size()),
               tokenizer->hash(), seconds);
  }
}

struct InspectFlags {
  std::string tokenizer;
  std::string text;
  bool with_text = false;
};

void run_inspect(const InspectFlags& flags, const Globals& globals) {
  const auto tokenizer = load_tokenizer(flags.tokenizer);
  const std::vector<std::int32_t> ids = tokenizer->encode(flags.text);
  std::vector<std::string> pieces;
  pieces.reserve(ids.size());
  for (const std::int32_t id : ids) pieces.push_back(tokenizer->piece(id));
  const bool round_trip = tokenizer->decode(ids) == flags.text;
  if (globals.json) {
    nlohmann::json out = {{"path", flags.tokenizer},
                          {"kind", tokenizer->kind()},
                          {"vocab_size", tokenizer->vocab_size()},
                          {"hash", tokenizer->hash()},
                          {"end_of_document", tokenizer->end_of_document()},
                          {"bos", tokenizer->bos()}};
    if (flags.with_text) {
      out["ids"] = ids;
      out["pieces"] = pieces;
      out["round_trip"] = round_trip;
    }
    fmt::print("{}\n", out.dump());
    return;
  }
  const auto line = [](const char* name, const std::string& value) {
    fmt::print("{:<16} {}\n", name, value);
  };
  line("tokenizer", flags.tokenizer);
  line("kind", tokenizer->kind());
  line("vocabulary", with_commas(tokenizer->vocab_size()));
  line("hash", tokenizer->hash());
  line("end of document", std::to_string(tokenizer->end_of_document()));
  if (flags.with_text) {
    std::string quoted;
    for (const std::string& piece : pieces)
      quoted += fmt::format("{}\"{}\"", quoted.empty() ? "" : " ", piece);
    line("tokens", fmt::format("{} for {} bytes", ids.size(), flags.text.size()));
    line("pieces", quoted);
    line("ids", fmt::format("{}", fmt::join(ids, " ")));
    line("round trip", round_trip ? "exact" : "NOT exact: this model changes the text");
    return;
  }
  constexpr std::int64_t kShown = 24;
  std::string last;
  for (auto id = std::max<std::int64_t>(0, tokenizer->vocab_size() - 1000); id < tokenizer->vocab_size();
       id += std::max<std::int64_t>(1, std::min<std::int64_t>(tokenizer->vocab_size(), 1000) / kShown)) {
    last += fmt::format("{}\"{}\"", last.empty() ? "" : " ", tokenizer->piece(static_cast<std::int32_t>(id)));
  }
  line("some pieces", last);
}

void add_training(CLI::App& tokenizer, Globals& globals) {
  CLI::App* sub = tokenizer.add_subcommand("train", "Train a SentencePiece BPE model on text");
  add_global_flags(*sub, globals);
  auto flags = std::make_shared<TrainFlags>();
  sub->add_option("IN", flags->inputs,
                  "Text files; .jsonl files with a \"text\" a line; .gz, .xz or .zst of either")
      ->required();
  sub->add_option("-o,--output", flags->output, "The model to write, for example bpe.model")->required();
  sub->add_option("--vocab", flags->training.vocab_size, "Tokens in the vocabulary")->capture_default_str();
  sub->add_option("--sample-mb", flags->sample_mb, "Train on a random sample of this many megabytes of lines")
      ->capture_default_str();
  sub->add_option("--seed", flags->training.seed, "Seed of the sample")->capture_default_str();
  sub->add_option("--invalid-utf8", flags->invalid_utf8, "error | replace (by U+FFFD) | skip (the document)")
      ->capture_default_str();
  sub->add_option("--field", flags->text.field, "The field of JSON lines that holds the text")
      ->capture_default_str();
  sub->footer(
      "Example:\n"
      "  fathom tokenizer train books.jsonl.xz --vocab 8192 -o bpe.model\n"
      "The model keeps every byte of the text: spaces, line ends and rare characters come back as they "
      "were.");
  sub->callback([flags, &globals] { run_train(*flags, globals); });
}

void add_inspect(CLI::App& tokenizer, Globals& globals) {
  CLI::App* sub = tokenizer.add_subcommand("inspect", "Show a tokenizer, and what it does to a text");
  add_global_flags(*sub, globals);
  auto flags = std::make_shared<InspectFlags>();
  sub->add_option("PATH", flags->tokenizer, "A SentencePiece model, a tokenizer.json, or bytes")->required();
  auto* text = sub->add_option("--text", flags->text, "Show the tokens of this text");
  sub->footer("Example:\n  fathom tokenizer inspect bpe.model --text \"Once upon a time\"");
  sub->callback([flags, text, &globals] {
    flags->with_text = text->count() > 0;
    run_inspect(*flags, globals);
  });
}

}  // namespace

void add_tokenizer(CLI::App& app, Globals& globals) {
  CLI::App* tokenizer = app.add_subcommand("tokenizer", "Train and look at tokenizers");
  tokenizer->require_subcommand(1);
  tokenizer->footer("Example:\n  fathom tokenizer train book.txt --vocab 4096 -o bpe.model");
  add_training(*tokenizer, globals);
  add_inspect(*tokenizer, globals);
}

}  // namespace fathom::app
