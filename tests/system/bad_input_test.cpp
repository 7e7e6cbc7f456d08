// What a user may do wrong to a training: one clear paragraph, the right status, and nothing is lost.
#include <filesystem>
#include <sstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "src/io/checksum.h"
#include "tests/system/cli.h"
#include "train/run_folder.h"

namespace fathom {
namespace {

namespace fs = std::filesystem;
using testing::content;
using testing::expect_refusal;
using testing::Experiment;
using testing::fathom_command;
using ::testing::HasSubstr;
using testing::Outcome;
using testing::read_bytes;
using testing::write_bytes;

class BadInput : public ::testing::Test {
 protected:
  Outcome train(const std::string& more, const std::string& before = "") const {
    return fathom_command(e, Experiment::train("mod", "run", more), before);
  }
  void refused(const std::string& more, int status, std::initializer_list<std::string> words) const {
    SCOPED_TRACE(more);
    expect_refusal(train(more), status, words);
  }
  void flip_a_bit(const std::string& path, double where) const {
    std::string bytes = read_bytes(path);
    bytes[static_cast<std::size_t>(where * static_cast<double>(bytes.size()))] ^= 16;
    write_bytes(path, bytes);
  }
  void truncate(const std::string& path) const { fs::resize_file(path, fs::file_size(path) / 2); }

  Experiment e;
};

TEST_F(BadInput, Config) {
  refused("--set model.detph=3", 2, {"model.detph", "Did you mean model.depth?"});
  refused("--set routing.capacity=0", 2, {"routing.capacity", "0", "above 0"});
  refused("--set model.heads=3", 2, {"model.width is 32", "model.heads is 3", "divide"});
  refused("--set train.tokens=100000", 2,
          {"2 horizons", "train.tokens = 100000", "train.steps = 40", "exactly one"});
  refused("--set train.steps=null", 2, {"no horizon"});
  refused("--set train.lr=fast", 2, {"train.lr", "fast", "a number"});
  refused("--set train.batch_tokens=250", 2, {"250", "multiple of train.seq_len"});
  write_bytes(e / "odd.yaml", "model: [1, 2\n");
  expect_refusal(fathom_command(e, "train odd.yaml --run-dir run"), 2, {"odd.yaml"});
  EXPECT_FALSE(fs::exists(e / "run"));
}

TEST_F(BadInput, StoresOfAnotherTokenizer) {
  for (const std::string seed : {"1", "2"}) {
    ASSERT_EQ(
        fathom_command(e, "tokenizer train text.jsonl --vocab 600 --seed " + seed + " -o " + seed + ".model")
            .status,
        0);
    ASSERT_EQ(fathom_command(e, "data prepare text.jsonl --valid-fraction 0.1 --tokenizer " + seed +
                                    ".model -o " + seed + ".h5")
                  .status,
              0);
  }
  refused("--set data.valid=1.valid.h5", 1,
          {"data.valid (1.valid.h5)", "another tokenizer", "data.train (bytes)"});
  refused("--set data.tokenizer=1.model", 1, {"1.model", "train.h5", "tokenizer"});
  e.trained("mod", "run", "--set train.steps=3");
  expect_refusal(fathom_command(e, "eval run --data 1.h5"), 1, {"1.h5", "tokenizer", "bytes"});
  // A run goes on with the text that it began with.
  refused("--set train.steps=3 --set data.train=train.valid.h5", 1, {"train.valid.h5", "other text"});
}

TEST_F(BadInput, DamagedStores) {
  const std::string good = read_bytes(e / "train.h5");
  truncate(e / "train.h5");
  refused("", 1, {"train.h5", "truncated"});
  write_bytes(e / "train.h5", good);
  flip_a_bit(e / "train.h5", 0.7);
  refused("", 1, {"train.h5", "checksum"});
  write_bytes(e / "train.h5", "\x89HDF\r\n\x1a\n" + std::string(4000, 'x'));
  refused("", 1, {"train.h5", "not one of Fathom's", "token store"});
  fs::remove(e / "train.h5");
  refused("", 1, {"train.h5", "No such file"});
  write_bytes(e / "train.h5", good);
  e.trained("mod", "other");
  refused("--set data.train=" + e.newest_checkpoint("other"), 1, {"checkpoint", "token store"});
  refused("--set data.train=.", 1, {"."});
}

TEST_F(BadInput, TextThatIsTooShort) {
  write_bytes(e / "short.txt", "a dozen byte");
  ASSERT_EQ(fathom_command(e, "data prepare short.txt -o short.h5").status, 0);
  refused("--set data.train=short.h5", 1, {"short.h5 holds 13 tokens", "33", "train.seq_len"});
  refused("--set data.valid=short.h5", 1, {"short.h5 holds 13 tokens", "33", "train.seq_len"});
}

TEST_F(BadInput, ADamagedCheckpointIsPassedOverForTheOneBefore) {
  e.trained("mod", "whole");
  for (const bool flip : {true, false}) {
    e.trained("mod", "run");
    // As if killed before the end, which is needed for the run to go on.
    std::string metrics = read_bytes(e / "run/metrics.jsonl");
    metrics.resize(metrics.rfind("{\"event\":\"end\""));
    write_bytes(e / "run/metrics.jsonl", metrics);
    const std::string newest = e.newest_checkpoint("run");
    flip ? flip_a_bit(newest, 0.5) : truncate(newest);
    const Outcome outcome = train("");
    ASSERT_EQ(outcome.status, 0) << outcome.err;
    EXPECT_THAT(outcome.err, HasSubstr("Warning: passed over a checkpoint"));
    EXPECT_THAT(outcome.err, HasSubstr("step_00000040.h5"));
    EXPECT_THAT(outcome.err, HasSubstr(flip ? "checksum" : "truncated"));
    EXPECT_THAT(outcome.err, HasSubstr("resume at step 35"));
    EXPECT_TRUE(fs::exists(newest + ".damaged"));
    testing::expect_same_run(e, "whole", "run");
    fs::remove_all(e / "run");
  }
}

// It is whole: going on from the one before it would throw steps away, and setting it aside a good file.
TEST_F(BadInput, ACheckpointThatIsNotDamagedIsNotPassedOver) {
  e.trained("dense", "dense");
  const std::string other = read_bytes(e.newest_checkpoint("dense"));
  e.trained("mod", "run");
  const std::string newest = e.newest_checkpoint("run");
  std::string newer = read_bytes(newest);
  newer[16] = 2;  // the format's version; the header's checksum stands at its end
  const std::uint64_t sum = checksum64(std::string_view(newer).substr(0, 504));
  newer.replace(504, sizeof sum, reinterpret_cast<const char*>(&sum), sizeof sum);
  const std::string metrics = read_bytes(e / "run/metrics.jsonl");
  for (const auto& [bytes, why] : {std::pair(newer, "update this one"), std::pair(other, "another model")}) {
    write_bytes(newest, bytes);
    refused("", 1, {"step_00000040.h5", why});
    EXPECT_EQ(e.newest_checkpoint("run"), newest);
    EXPECT_FALSE(fs::exists(newest + ".damaged"));
    EXPECT_EQ(read_bytes(e / "run/metrics.jsonl"), metrics);
  }
}

TEST_F(BadInput, WhenNoCheckpointIsGoodNothingIsOverwritten) {
  e.trained("mod", "run");
  for (const CheckpointFile& file : list_checkpoints(e / "run")) flip_a_bit(file.path.string(), 0.5);
  const std::string metrics = read_bytes(e / "run/metrics.jsonl");
  refused("", 1, {"No checkpoint of run can be used", "checksum"});
  EXPECT_EQ(read_bytes(e / "run/metrics.jsonl"), metrics);
  EXPECT_EQ(list_checkpoints(e / "run").size(), 2u);
  expect_refusal(fathom_command(e, "eval run --data train.h5"), 1, {"step_00000040.h5", "checksum"});
  expect_refusal(fathom_command(e, "generate run -p x"), 1, {"step_00000040.h5", "checksum"});
}

TEST_F(BadInput, CheckpointsOfAnotherShape) {
  e.trained("dense", "dense");
  refused("--resume dense --set train.steps=50", 1, {"router.weight", "another model"});
  refused("--resume dense --set train.steps=50 --set routing.kind=none --set model.width=64", 1,
          {"[320, 32]", "[320, 64]", "another shape"});
  refused("--resume absent", 1, {"absent does not exist"});
  refused("--resume train.h5", 1, {"train.h5", "token store", "checkpoint"});
  refused("--resume dense --set routing.kind=none", 1, {"is at step 40", "longer horizon"});
  refused("--resume text.jsonl", 1, {"text.jsonl", "not a Fathom file"});
}

TEST_F(BadInput, ARunFolderOfAnotherConfigSaysWhatDiffers) {
  e.trained("mod", "run");
  const auto before = content(e.newest_checkpoint("run"));
  refused("--set train.lr=0.01 --set model.depth=6", 1,
          {"run of another config", "model.depth: 6 here, 4 there", "train.lr: 0.01 here, 0.003 there",
           "--run-dir"});
  refused("--resume never", 1, {"run already holds a run", "--resume never"});
  EXPECT_EQ(content(e.newest_checkpoint("run")), before);
  // What computes nothing else may differ.
  EXPECT_EQ(train("--set train.log_every=7 --set train.recompute=block").status, 0);
}

TEST_F(BadInput, AnUnwritableRunFolder) {
  write_bytes(e / "run", "a file");
  refused("", 1, {"run folder run is a file"});
  expect_refusal(fathom_command(e, Experiment::train("mod", "run/below")), 1, {"run/below"});
  expect_refusal(fathom_command(e, Experiment::train("mod", "/proc/run")), 1, {"/proc/run"});
  if (::geteuid() == 0) return;  // permissions do not hold root; /proc above does
  fs::create_directory(e / "closed");
  fs::permissions(e / "closed", fs::perms::owner_read | fs::perms::owner_exec);
  expect_refusal(fathom_command(e, Experiment::train("mod", "closed/run")), 1,
                 {"closed/run", "Permission denied"});
}

// A limit on the size of files does what a full disk does: a write within a checkpoint fails.
TEST_F(BadInput, AFullDiskKeepsThePreviousCheckpoint) {
  const std::string longer = "--set train.steps=60";
  e.trained("mod", "whole", longer);
  // The checkpoint of a wider optimizer state does not fit; here the limit comes after the first checkpoints.
  testing::Background run(e, Experiment::train("mod", "run", longer));
  testing::wait_until([&] { return !e.newest_checkpoint("run").empty() || !run.running(); }, "a checkpoint");
  run.signal(SIGTERM);
  ASSERT_EQ(run.wait().status, 0);
  const std::string last = e.newest_checkpoint("run");
  const auto before = content(last);
  expect_refusal(train(longer, "ulimit -f 200;"), 1,
                 {"checkpoints/step_", "File too large", "Free some space"});
  EXPECT_EQ(e.newest_checkpoint("run"), last);
  EXPECT_EQ(content(last), before);
  for (const auto& entry : fs::directory_iterator(e / "run/checkpoints")) {
    EXPECT_EQ(entry.path().extension(), ".h5") << entry.path();
  }
  EXPECT_EQ(e.lines("run").back().at("status"), "failed");
  EXPECT_THAT(e.lines("run").back().at("message").get<std::string>(), HasSubstr("File too large"));
  e.trained("mod", "run", longer);
  testing::expect_same_run(e, "whole", "run");
}

// When not even a line of metrics can be written.
TEST_F(BadInput, AFullDiskAtTheMetrics) {
  e.trained("mod", "whole", "--set train.log_every=1");
  const Outcome outcome = train("", "ulimit -f 4;");
  expect_refusal(outcome, 1, {"File too large"});
  e.trained("mod", "run");
  testing::expect_same_run(e, "whole", "run");
}

TEST_F(BadInput, ADamagedLineOfTheMetrics) {
  e.trained("mod", "run", "--set train.steps=10");
  std::string metrics = read_bytes(e / "run/metrics.jsonl");
  metrics[metrics.find("\"tokens\"")] = '}';
  write_bytes(e / "run/metrics.jsonl", metrics);
  refused("--set train.steps=10", 1, {"metrics.jsonl", "line "});
  expect_refusal(fathom_command(e, "report run -o page.html"), 1, {"metrics.jsonl", "line "});
}

TEST_F(BadInput, PromptsThatAreNone) {
  e.trained("mod", "run", "--set train.steps=3");
  const auto generate = [&](const std::string& arguments, std::initializer_list<std::string> words) {
    SCOPED_TRACE(arguments);
    expect_refusal(fathom_command(e, "generate run " + arguments), 1, words);
  };
  generate("--prompt-ids 1,999", {"999", "vocabulary of 257"});
  generate("--prompt-ids 1,-4", {"-4", "vocabulary of 257"});
  generate("--prompt-ids 1,300", {"300", "vocabulary of 257"});  // an id that only pads
  generate("-p ''", {"prompt is empty"});
  generate("--prompts absent.jsonl", {"absent.jsonl"});
  for (const char* line :
       {"{\"prompt\": 5, \"text\": \"a\"}", "{\"prompt\": null, \"text\": \"a\"}", "{\"text\": 5}"}) {
    write_bytes(e / "prompts.jsonl", line);
    generate("--prompts prompts.jsonl", {"prompts.jsonl:1", "a string under \"prompt\""});
  }
  // When none can be read, the first says why.
  write_bytes(e / "prompts.jsonl", "\nno json\n{\"text\": 5}\n");
  generate("--prompts prompts.jsonl", {"prompts.jsonl:2", "a string under \"prompt\"", "not JSON"});
  write_bytes(e / "prompts.jsonl", "\n");
  generate("--prompts prompts.jsonl", {"holds no prompt"});
  for (const char* prompt : {"-p x", "--prompt-ids 1"}) {
    expect_refusal(fathom_command(e, std::string("generate run --tokenizer nowhere ") + prompt), 2,
                   {"--tokenizer nowhere", "bytes", "Leave"});
  }
  EXPECT_EQ(fathom_command(e, "generate run -n 1 -p x --tokenizer bytes").status, 0);
  e.trained("mod", "topk", "--set train.steps=3 --set routing.causal.method=none");
  expect_refusal(fathom_command(e, "generate topk -p x"), 1,
                 {"routing.causal.method: none", "aux, predictor or both"});
}

// What can be read of a file of prompts is answered, in the file's order, beside what cannot.
TEST_F(BadInput, LinesOfPromptsThatCannotBeRead) {
  e.trained("mod", "run", "--set train.steps=3");
  write_bytes(e / "prompts.jsonl",
              "no json\n{\"prompt\": \"a\"}\n\n{\"prompt\": 5}\n{\"prompt\": \"\xff\"}\n{\"text\": "
              "\"b\"}\n[\"prompt\"]\n");
  const Outcome outcome = fathom_command(e, "generate run --prompts prompts.jsonl -n 3 --json");
  EXPECT_EQ(outcome.status, 1);
  EXPECT_THAT(outcome.err, HasSubstr("4 of 6 prompts"));
  std::istringstream out(outcome.out);
  std::vector<nlohmann::json> lines;
  for (std::string line; std::getline(out, line);) lines.push_back(nlohmann::json::parse(line));
  ASSERT_EQ(lines.size(), 6U) << outcome.err;
  const auto answered = [&](std::size_t i, const char* prompt) {
    EXPECT_EQ(lines[i].at("prompt"), prompt);
    EXPECT_EQ(lines[i].at("tokens").size(), 3U);
    EXPECT_FALSE(lines[i].contains("error"));
  };
  const auto refused_line = [&](std::size_t i, const char* where, const char* why) {
    SCOPED_TRACE(where);
    EXPECT_EQ(lines[i].at("finish_reason"), "error");
    EXPECT_THAT(lines[i].at("error").get<std::string>(), HasSubstr(where));
    EXPECT_THAT(lines[i].at("error").get<std::string>(), HasSubstr("a string under \"prompt\""));
    EXPECT_THAT(lines[i].at("error").get<std::string>(), HasSubstr(why));
    EXPECT_EQ(lines[i].at("tokens").size(), 0U);
  };
  refused_line(0, "prompts.jsonl:1:", "not JSON");
  answered(1, "a");
  refused_line(2, "prompts.jsonl:4:", "a number");
  refused_line(3, "prompts.jsonl:5:", "UTF-8");
  answered(4, "b");
  refused_line(5, "prompts.jsonl:7:", "an array");

  // One that can be read is no prompt alone: it has company in the file.
  write_bytes(e / "prompts.jsonl", "no json\n{\"prompt\": \"a\"}\n");
  const Outcome shown = fathom_command(e, "generate run --prompts prompts.jsonl -n 3 --temperature 0");
  EXPECT_EQ(shown.status, 1);
  EXPECT_EQ(shown.out, fathom_command(e, "generate run -p a -n 3 --temperature 0").out);
  EXPECT_THAT(shown.err, HasSubstr("prompt 1: prompts.jsonl:1: expected"));
  EXPECT_THAT(shown.err, HasSubstr("1 of 2 prompts"));
}

}  // namespace
}  // namespace fathom
