// fathom serve as a process: from its first line to its exit status, with curl's and OpenAI's own clients.
#include <algorithm>
#include <cmath>
#include <csignal>
#include <iterator>
#include <thread>

#include <gmock/gmock.h>

#include "src/io/token_store.h"
#include "tests/serve/client.h"
#include "tests/system/cli.h"
#include "tests/system/python.h"

namespace fathom {
namespace {

using nlohmann::json;
using serve::Connection;
using serve::Response;
using testing::Background;
using ::testing::HasSubstr;

class Serve : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    experiment_ = new testing::Experiment();
    experiment_->trained("mod", "run");
  }
  static void TearDownTestSuite() {
    delete experiment_;
    experiment_ = nullptr;
  }

  /// `fathom serve RUN MORE` once it serves; port() is then where.
  std::unique_ptr<Background> start(const std::string& more = "", const std::string& run = "run") {
    testing::write_bytes(*experiment_ / "background.out", "");  // not the server's before
    auto server = std::make_unique<Background>(
        *experiment_, "serve " + run + " --port 0 --json --threads 1 --cache-gb 0.01 " + more);
    testing::wait_until(
        [&] {
          ready_ = json::parse(testing::read_bytes(*experiment_ / "background.out"), nullptr, false);
          return ready_.is_object() || !server->running();
        },
        "the server");
    return server;
  }
  /// A client whose answer is being written. On a busy machine an answer may be over before anybody looks:
  /// then another one is asked for.
  std::unique_ptr<Connection> being_written(const std::string& request) const {
    std::unique_ptr<Connection> client;
    int looks = 0;
    testing::wait_until(
        [&] {
          if (looks++ % 100 == 0) {
            client = std::make_unique<Connection>(port());
            client->send(request);
          }
          const std::string metrics = serve::get(port(), "/metrics").body;
          const std::size_t at = metrics.find("\nfathom_requests_running ");
          return at != std::string::npos && std::stod(metrics.substr(at + 25)) >= 1;
        },
        "a text that is being written");
    return client;
  }
  std::uint16_t port() const { return ready_.value("port", std::uint16_t{0}); }

  static inline testing::Experiment* experiment_ = nullptr;
  json ready_;
};

TEST_F(Serve, SaysWhatGenerateSays) {
  const auto server = start("--invariant");
  EXPECT_EQ(ready_["model"], "run");
  const json r = serve::post(port(), "/v1/completions",
                             {{"prompt", "The "}, {"max_tokens", 12}, {"temperature", 0.7}, {"seed", 9}})
                     .json();
  const json alone =
      testing::fathom_command(
          *experiment_,
          "generate run -p 'The ' -n 12 --temperature 0.7 --seed 9 --invariant --json --threads 1")
          .json();
  EXPECT_EQ(r["choices"][0]["text"], alone["text"]);
  EXPECT_EQ(r["usage"]["routed_fraction_by_layer"], alone["routed_fraction"]);
  server->signal(SIGTERM);
  const testing::Outcome end = server->wait();
  EXPECT_EQ(end.status, 0) << end.err;
  EXPECT_THAT(end.err, HasSubstr("Stopped"));
}

// As harnesses for evaluations ask: the prompt given back with the log-probability of each token.
TEST_F(Serve, ScoresWhatEvalSays) {
  // Ids that pad the vocabulary have a share of eval's probabilities, small once a model has learnt that they
  // never come, and are none of the server's. This model has no padding.
  experiment_->trained("mod", "unpadded", "--set model.vocab_size=257");
  const auto server = start("--invariant", "unpadded");
  constexpr std::int64_t kSeq = 32, kTexts = 20;
  const TokenStore store = TokenStore::open(*experiment_ / "train.valid.h5");
  ASSERT_GT(store.num_tokens(), kSeq * kTexts);
  json prompts = json::array();
  for (std::int64_t i = 0; i < kTexts; ++i) {
    std::vector<std::int32_t> ids(kSeq + 1);
    store.read(i * kSeq, ids);
    prompts.push_back(ids);
  }
  const json r = serve::post(port(), "/v1/completions",
                             {{"prompt", prompts}, {"max_tokens", 0}, {"echo", true}, {"logprobs", 1}})
                     .json();
  double loss = 0;
  for (const json& choice : r["choices"]) {
    const json& values = choice["logprobs"]["token_logprobs"];
    ASSERT_EQ(values.size(), static_cast<std::size_t>(kSeq + 1));
    for (std::size_t i = 1; i < values.size(); ++i) loss -= values[i].get<double>() / (kSeq * kTexts);
  }
  const json eval =
      testing::fathom_command(*experiment_,
                              "eval unpadded --data train.valid.h5 --engine --invariant --json --threads 1 "
                              "--tokens " +
                                  std::to_string(kSeq * kTexts))
          .json();
  EXPECT_EQ(eval["tokens"], kSeq * kTexts);
  EXPECT_NEAR(loss, eval["loss"].get<double>(), 1e-6);
}

// lm-evaluation-harness's own windows: those of eval, two tokens shorter than what it is told to be the
// longest, the first token of all being predicted from a prefix.
TEST_F(Serve, LmEvalComputesEvalsPerplexity) {
  const testing::Python python("lm_eval, aiohttp, tenacity, datasets");
  if (!python) GTEST_SKIP() << python.why_not();
  experiment_->trained("mod", "unpadded", "--set model.vocab_size=257");
  const auto server = start("--invariant", "unpadded");
  constexpr std::int64_t kSeq = 30, kTokens = 30 * kSeq;
  const TokenStore store = TokenStore::open(*experiment_ / "train.valid.h5");
  std::vector<std::int32_t> ids(kTokens + 1);
  store.read(0, ids);
  std::string text;
  // The first document alone: the end of one is no text.
  for (std::size_t i = 1; i < ids.size(); ++i) {
    ASSERT_LT(ids[i], 128) << i;
    text += static_cast<char>(ids[i]);
  }
  testing::write_bytes(*experiment_ / "held_out.jsonl", json{{"text", text}}.dump() + "\n");
  const json said =
      python.says(*experiment_, "../system/lm_eval_client.py",
                  "http://127.0.0.1:" + std::to_string(port()) + " unpadded " + std::to_string(kSeq + 2) +
                      " " + (*experiment_ / "held_out.jsonl") + " " + std::to_string(ids[0]));
  const json eval =
      testing::fathom_command(*experiment_,
                              "eval unpadded --data train.valid.h5 --engine --invariant --json --threads 1 "
                              "--seq-len " +
                                  std::to_string(kSeq) + " --tokens " + std::to_string(kTokens))
          .json();
  EXPECT_EQ(eval["tokens"], kTokens);
  EXPECT_NEAR(said["byte_perplexity"].get<double>(), eval["perplexity"].get<double>(), 1e-4);
}

TEST_F(Serve, FinishesWhatRunsOnSigtermAndEndsAtOnceOnASecond) {
  const std::string request =
      serve::request_text("POST", "/v1/completions",
                          json{{"prompt", "a"}, {"max_tokens", 28}, {"n", 100}, {"ignore_eos", true}}.dump());
  auto server = start("--sequences 4");
  auto client = being_written(request);
  server->signal(SIGTERM);
  const Response r = client->read();
  EXPECT_EQ(r.status, 200);
  EXPECT_EQ(r.json()["choices"].size(), 100u);
  EXPECT_EQ(server->wait().status, 0);

  const std::string longer =
      serve::request_text("POST", "/v1/completions",
                          json{{"prompt", "a"}, {"max_tokens", 28}, {"n", 120}, {"ignore_eos", true}}.dump());
  server = start("--sequences 1");
  std::vector<std::unique_ptr<Connection>> clients;
  for (int i = 0; i < 8; ++i) {
    clients.push_back(std::make_unique<Connection>(port()));
    clients.back()->send(longer);
  }
  clients.push_back(being_written(longer));
  server->signal(SIGTERM);
  // The first has been seen, so that the second is another one.
  testing::wait_until([&] { return server->said("Stopping"); }, "the first signal");
  server->signal(SIGTERM);
  EXPECT_EQ(server->wait().status, 1);
  // And after the worst end, in the midst of an answer, another one serves.
  server = start();
  const auto cut = being_written(longer);
  server->signal(SIGKILL);
  server->wait();
  server = start();
  EXPECT_EQ(serve::get(port(), "/health").status, 200);
  Connection again(port());
  again.send(request);
  EXPECT_EQ(again.read().json()["choices"].size(), 100u);
}

TEST_F(Serve, IsLoadedByABenchThatSaysWhatWasRefused) {
  const auto server = start();
  const std::string load = "bench load http://127.0.0.1:" + std::to_string(port()) +
                           " --data train.valid.h5 --requests 5 --clients 2 --prompt-min 3 --prompt-max 9 "
                           "--new-min 1 --json";
  for (const char* how : {"", " --whole", " --rate 100"}) {
    SCOPED_TRACE(how);
    const json line = testing::fathom_command(*experiment_, load + " --new-max 4" + how).json();
    EXPECT_EQ(line["failed"], 0);
    EXPECT_GE(line["new_tokens"], 5);
    EXPECT_EQ(line["errors"], json::object());
  }
  const json line = testing::fathom_command(*experiment_, load + " --new-max 3000 --seed 3").json();
  EXPECT_GT(line["failed"], 0);
  EXPECT_EQ(line["errors"], (json{{"status 400 (context_length_exceeded)", line["failed"]}}));
}

TEST_F(Serve, RefusesInOneParagraph) {
  const auto server = start();
  const std::string taken = std::to_string(port());
  const auto refused = [&](const std::string& flags, int status, std::initializer_list<std::string> words) {
    testing::expect_refusal(testing::fathom_command(*experiment_, "serve " + flags), status, words);
  };
  refused("run --port " + taken, 1, {taken, "Another program has it", "--port"});
  refused("run --port 0 --host example", 2, {"--host example", "127.0.0.1"});
  refused("run --port 99999", 2, {"--port", "65535"});
  refused("run --port 0 --cors-origin https://app.example/", 2, {"--cors-origin", "https://app.example"});
  refused("run --port 0 --allow-host app.example:8000", 2, {"--allow-host", "fathom.example"});
  refused("nowhere --port 0", 1, {"nowhere"});
  refused("run --port 0 --cache-gb 0.000001", 1, {"cache"});
  refused("run --port 0 --api-key-file nowhere.txt", 1, {"nowhere.txt", "key"});
  experiment_->trained("mod", "topk", "--set routing.causal.method=none");
  refused("topk --port 0", 1, {"routing.causal.method: none"});
}

// Bytes that are no characters are written as the server does, or as JSON's writer.
std::string ascii_of(const json& text) {
  std::string all = text, some;
  std::copy_if(all.begin(), all.end(), std::back_inserter(some), [](char c) { return c >= 0; });
  return some;
}

TEST_F(Serve, SpeculatesAndSaysWhatGenerateSays) {
  experiment_->trained("dense", "small");
  constexpr const char* kSmall =
      " --retrieval-budget 16 --retrieval-chunk 2 --draft-window 8 --draft-sinks 2";
  const json alone =
      testing::fathom_command(*experiment_,
                              "generate run -p 'The ' -n 20 --temperature 0 --invariant --json --threads 1")
          .json();
  const std::string drawn =
      "generate run -p 'The ' -n 20 --seed 9 --temperature 0.7 --json --threads 1 --invariant";
  const json seeded = testing::fathom_command(*experiment_, drawn).json();
  const json noise =
      testing::fathom_command(*experiment_, drawn + " --speculate ngram --coupling gumbel").json();
  for (const std::string how : {"ngram --gamma 4", "draft", "draft --draft small --gamma 3",
                                "retrieval --coupling gumbel", "triforce --speculate-max-requests 2"}) {
    SCOPED_TRACE(how);
    const auto server = start("--invariant --speculate " + how + (how[0] == 'n' ? "" : kSmall));
    EXPECT_EQ(ready_["speculate"], how.substr(0, how.find(' ')));
    json body = {{"prompt", "The "}, {"max_tokens", 20}, {"temperature", 0}};
    const json r = serve::post(port(), "/v1/completions", body).json();
    EXPECT_EQ(r["choices"][0]["text"], alone["text"]);
    EXPECT_EQ(r["usage"]["routed_fraction_by_layer"], alone["routed_fraction"]);
    body["temperature"] = 0.7;
    body["seed"] = 9;
    EXPECT_EQ(ascii_of(serve::post(port(), "/v1/completions", body).json()["choices"][0]["text"]),
              ascii_of((how.ends_with("gumbel") ? noise : seeded)["text"]));
    EXPECT_THAT(serve::get(port(), "/metrics").body,
                HasSubstr("\nfathom_speculative_passes_total{level=\"target\"} "));
    server->signal(SIGTERM);
    EXPECT_EQ(server->wait().status, 0);
  }
}

// In generate's words, and before anybody can connect.
TEST_F(Serve, RefusesToSpeculateAsGenerateDoes) {
  experiment_->trained("dense", "dense");
  experiment_->trained("mod", "short", "--set model.max_seq_len=16 --set train.seq_len=16");
  for (const char* command : {"tokenizer train text.jsonl --vocab 400 -o bpe.model",
                              "data prepare text.jsonl --tokenizer bpe.model --valid-fraction 0.1 -o bpe.h5"})
    ASSERT_EQ(testing::fathom_command(*experiment_, command).status, 0) << command;
  experiment_->trained(
      "dense", "other",
      "--set data.train=bpe.h5 --set data.valid=bpe.valid.h5 --set data.tokenizer=bpe.model");
  const auto refused = [&](const std::string& flags, int status, std::initializer_list<std::string> words) {
    const testing::Outcome outcome = testing::fathom_command(*experiment_, "serve --port 0 " + flags);
    testing::expect_refusal(outcome, status, words);
    return outcome.err;
  };
  for (const std::string flags :
       {"run --speculate often", "run --gamma 3", "run --draft ngram", "run --speculate ngram --gamma 40",
        "run --speculate retrieval --draft ngram", "dense --speculate draft",
        "dense --speculate draft --draft self-skip", "run --speculate retrieval --retrieval-budget 100000",
        "run --speculate retrieval --retrieval-budget 20", "run --speculate draft --draft nowhere",
        "run --speculate draft --draft other"}) {
    const testing::Outcome generate = testing::fathom_command(*experiment_, "generate -p x -n 4 " + flags);
    std::string words = refused(flags, generate.status, {});
    words.erase(0, words.rfind("fathom: "));  // where it listened, until the models were there
    const std::size_t help = words.find("see fathom serve --help");
    if (help != std::string::npos) words.replace(help, 23, "see fathom generate --help");
    EXPECT_EQ(words, generate.err) << flags;
  }
  refused("run --speculate draft --draft short", 1, {"draft's context is 16 tokens", "may come to"});
  refused("run --speculate-max-requests 2", 2, {"--speculate-max-requests goes with --speculate"});
  refused("run --speculate ngram --speculate-max-requests 0", 2, {"--speculate-max-requests"});
  experiment_->trained("mod", "topk", "--set routing.causal.method=none");
  refused("topk --speculate ngram", 1, {"routing.causal.method: none"});
}

TEST_F(Serve, OpenAisOwnClientUnderstandsIt) {
  const testing::Python python("openai");
  if (!python) GTEST_SKIP() << python.why_not();
  const auto server = start();
  const json said = python.says(*experiment_, "../system/openai_client.py",
                                "http://127.0.0.1:" + std::to_string(port()) + "/v1");
  EXPECT_EQ(said["failures"], json::array());
  EXPECT_GT(said["checks"], 10);
}

}  // namespace
}  // namespace fathom
