// A server that speculates answers as one that does not: to the byte where nothing is drawn, and in
// distribution where something is.
#include <cmath>
#include <fstream>
#include <map>
#include <thread>

#include <fmt/format.h>
#include <gmock/gmock.h>

#include "infer/generate.h"
#include "tests/infer/ways_to_speculate.h"
#include "tests/io/temp.h"
#include "tests/serve/tiny_server.h"

namespace fathom::serve {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using Method = SpeculationOptions::Method;
using Draft = SpeculationOptions::Draft;

SpeculationOptions by(Method method, Draft draft, std::int64_t proposals) {
  SpeculationOptions o = testing_support::way_of(method, draft, proposals);
  o.plain_first = 0;
  return o;
}

const SpeculationOptions kRetrieval = by(Method::Retrieval, Draft::Ngram, 6);

std::map<std::string, SpeculationOptions> ways() {
  return {{"ngram", by(Method::Ngram, Draft::Ngram, 4)},
          {"retrieval", kRetrieval},
          {"self_skip", by(Method::Draft, Draft::SelfSkip, 4)},
          {"triforce", by(Method::Triforce, Draft::SelfSkip, 0)}};
}

/// A path and a body.
struct Ask {
  std::string path = "/v1/completions";
  json body;
};

std::string long_prompt(int seed, std::size_t bytes) {
  std::mt19937_64 r(static_cast<std::uint64_t>(seed));
  std::string text;
  while (text.size() < bytes) text += static_cast<char>('a' + r() % 26);
  return text;
}

std::vector<Ask> asks() {
  std::vector<json> bodies = {
      {{"prompt", "The sea"}, {"max_tokens", 60}},
      {{"prompt", long_prompt(1, 150)}, {"max_tokens", 90}, {"logprobs", 3}},
      {{"prompt", long_prompt(2, 90)}, {"max_tokens", 50}, {"return_routing", true}},
      {{"prompt", long_prompt(3, 40)}, {"max_tokens", 40}, {"echo", true}, {"logprobs", 1}},
      {{"prompt", long_prompt(3, 40)}, {"max_tokens", 0}, {"echo", true}, {"logprobs", 1}},
      {{"prompt", {"ab", long_prompt(4, 60)}}, {"max_tokens", 30}, {"n", 2}},
      {{"prompt", "a"}, {"max_tokens", 60}, {"presence_penalty", 1.5}, {"frequency_penalty", 0.5}},
      {{"prompt", "a"}, {"max_tokens", 40}, {"logit_bias", {{"101", 5}, {"102", -100}}}},
      {{"prompt", long_prompt(5, 30)}, {"max_tokens", 40}, {"routing_threshold", 0.6}},
      {{"prompt", long_prompt(5, 30)}, {"max_tokens", 40}, {"repetition_penalty", 1.3}, {"top_k", 3}},
      {{"prompt", "b"}, {"max_tokens", 500}, {"ignore_eos", true}},
      {{"prompt", "c"}, {"max_tokens", 30}, {"cache_prompt", false}, {"stop", {"e", "\n"}}},
  };
  std::vector<Ask> all;
  for (json& body : bodies) {
    body["temperature"] = 0;
    all.push_back({.body = body});
    if (body["max_tokens"] == 0) continue;
    body["stream"] = true;
    body["stream_options"] = {{"include_usage", true}};
    all.push_back({.body = body});
  }
  const json messages = {{{"role", "user"}, {"content", "What is a river?"}}};
  all.push_back({"/v1/chat/completions",
                 {{"messages", messages}, {"max_tokens", 40}, {"temperature", 0}, {"logprobs", true}}});
  return all;
}

/// All that an answer says but who it is, when it came, and what of it lay in the cache; of a stream what its
/// pieces come to, however they are cut.
json said(const Response& r, bool is_stream) {
  EXPECT_EQ(r.status, 200) << r.body;
  const auto plain = [](json answer) {
    answer.erase("id");
    answer.erase("created");
    if (answer.contains("usage") && answer["usage"].is_object())
      answer["usage"].erase("prompt_tokens_details");
    return answer;
  };
  if (!is_stream) return plain(r.json());
  json whole;
  for (json event : r.events()) {
    event = plain(event);
    if (event["usage"].is_object()) whole["usage"] = event["usage"];
    for (const json& choice : event["choices"]) {
      json& sum = whole["choices"][choice["index"].dump()];
      if (sum.is_null()) sum = json::object();
      sum["text"] = sum.value("text", std::string()) + choice["text"].get<std::string>();
      if (!choice["finish_reason"].is_null()) sum["finish_reason"] = choice["finish_reason"];
      if (choice.contains("routing"))
        for (const json& token : choice["routing"]["kept"]) sum["kept"].push_back(token);
      if (!choice.value("logprobs", json()).is_object()) continue;
      for (const auto& [list, values] : choice["logprobs"].items())
        for (const json& value : values) sum[list].push_back(value);
    }
  }
  return whole;
}

json answer(TinyServer& server, const Ask& ask) {
  return said(post(server.port(), ask.path, ask.body), ask.body.value("stream", false));
}

std::vector<json> plain_answers() {
  TinyServer server;
  server.open();
  std::vector<json> answers;
  for (const Ask& ask : asks()) answers.push_back(answer(server, ask));
  return answers;
}

TEST(ServedSpeculation, GreedyAnswersAreThoseWithoutIt) {
  const std::vector<json> expected = plain_answers();
  for (const auto& [name, options] : ways()) {
    TinyServer server({.speculation = options});
    server.open();
    for (std::size_t i = 0; i < expected.size(); ++i)
      EXPECT_EQ(answer(server, asks()[i]), expected[i]) << name << asks()[i].body;
    EXPECT_TRUE(server.all_blocks_free()) << name;
    EXPECT_GT(server.metric(R"(fathom_speculative_passes_total{level="target"})"), 100) << name;
    server.stop();
  }
}

// Eight clients, who are alone now and then: texts go over to passes and back in the midst of it.
TEST(ServedSpeculation, GreedyAnswersToEightAtOnceAreThoseWithoutIt) {
  const std::vector<json> expected = plain_answers();
  for (const std::int64_t texts : {1, 3}) {
    for (const auto& [name, options] : ways()) {
      TinyServer server({.cache_texts = 6, .speculation = options, .speculated_texts = texts});
      server.open();
      const std::vector<Ask> all = asks();
      std::vector<std::thread> clients;
      for (std::size_t c = 0; c < 8; ++c) {
        clients.emplace_back([&, c, name = name] {
          for (std::size_t k = 0; k < 6; ++k) {
            const std::size_t i = (c * 5 + k * 7) % all.size();
            EXPECT_EQ(answer(server, all[i]), expected[i]) << name << all[i].body;
            std::this_thread::sleep_for(std::chrono::milliseconds((c * k) % 5 * 10));
          }
        });
      }
      for (std::thread& client : clients) client.join();
      // However slow the machine, these are alone.
      for (std::size_t i = 0; i < 3; ++i)
        EXPECT_EQ(answer(server, all[i]), expected[i]) << name << all[i].body;
      EXPECT_TRUE(server.all_blocks_free()) << name;
      server.stop();
      const EngineStats stats = server.stats();
      EXPECT_GT(stats.cycles.levels.back().tokens, 0);
      EXPECT_LT(stats.cycles.levels.back().tokens, stats.decoded_tokens);
    }
  }
}

// Wherever in a cycle's tokens a stop string ends.
TEST(ServedSpeculation, AStopStringMayEndInWhatWasAccepted) {
  TinyServer plain, speculating({.speculation = kRetrieval});
  plain.open();
  speculating.open();
  Ask ask{.body = {{"prompt", long_prompt(6, 80)},
                   {"max_tokens", 70},
                   {"temperature", 0},
                   {"return_routing", true},
                   {"logprobs", 1}}};
  for (int letter = 'a'; letter <= 'z'; ++letter) ask.body["logit_bias"][std::to_string(letter)] = 50;
  const std::string text = answer(plain, ask)["choices"][0]["text"];
  int stopped = 0;
  for (std::size_t at = 2; at + 4 < text.size(); at += 3) {
    const std::string stop = text.substr(at, 3);
    for (const bool stream : {false, true}) {
      ask.body["stop"] = stop;
      ask.body["stream"] = stream;
      ask.body["stream_options"] = stream ? json{{"include_usage", true}} : json();
      const json expected = answer(plain, ask);
      EXPECT_EQ(answer(speculating, ask), expected) << stop;
      stopped += !stream && expected["choices"][0]["finish_reason"] == "stop" ? 1 : 0;
    }
  }
  EXPECT_GT(stopped, 5);
  EXPECT_TRUE(speculating.all_blocks_free());
  EXPECT_GT(speculating.metric(R"(fathom_speculative_accepted_tokens_total{level="target"})"), 100);
}

TEST(ServedSpeculation, AClientThatLeavesTakesItsBlocksAlong) {
  for (const auto& [name, options] : ways()) {
    TinyServer server({.speculation = options});
    server.open();
    for (int i = 0; i < 6; ++i) {
      Connection client(server.port());
      client.send(request_text(
          "POST", "/v1/completions",
          json{{"prompt", long_prompt(i, 60)}, {"max_tokens", 440}, {"ignore_eos", true}, {"stream", true}}
              .dump()));
      std::string begun;
      while (begun.size() < 2000U + 500U * static_cast<std::size_t>(i)) {
        const std::string more = client.read_some();
        ASSERT_FALSE(more.empty()) << begun;
        begun += more;
      }
      client.close();
      EXPECT_TRUE(server.all_blocks_free()) << name;
    }
    EXPECT_GT(server.metric("fathom_requests_cancelled_total"), 0);
  }
}

TEST(ServedSpeculation, MetricsAndTheAccessLogSayHowItFared) {
  const testing::TempFolder folder;
  TinyOptions o{.speculation = kRetrieval};
  o.service.access_log = folder / "access.jsonl";
  TinyServer server(o);
  server.open();
  const Ask ask{.body = {{"prompt", long_prompt(6, 80)}, {"max_tokens", 60}, {"temperature", 0}}};
  const json first = answer(server, ask);
  const auto of = [&](const std::string& what, const std::string& level) {
    return server.metric("fathom_speculative_" + what + "_total{level=\"" + level + "\"}");
  };
  const double tokens = of("tokens", "target"), passes = of("passes", "target");
  EXPECT_EQ(tokens, 59);  // the first came of the prompt's pass
  EXPECT_EQ(first["usage"]["completion_tokens"], 60);
  EXPECT_EQ(tokens, of("accepted_tokens", "target") + passes);
  EXPECT_GE(of("proposed_tokens", "target"), of("accepted_tokens", "target"));
  EXPECT_EQ(of("proposed_tokens", "target"), of("tokens", "retrieval"));
  EXPECT_GT(of("passes", "retrieval"), 0);
  EXPECT_EQ(server.metric("fathom_generated_tokens_total"), 60);
  EXPECT_EQ(server.metric("fathom_rows_total"),
            server.metric("fathom_prompt_tokens_total") + passes + of("proposed_tokens", "target"));
  EXPECT_EQ(server.metric("fathom_speculative_given_up_total"), 0);

  Ask seeded = ask;
  seeded.body["temperature"] = 1;
  seeded.body["seed"] = 3;
  answer(server, seeded);
  EXPECT_EQ(server.metric(R"(fathom_speculative_plain_texts_total{reason="seed"})"), 1);
  EXPECT_EQ(server.metric(R"(fathom_speculative_plain_texts_total{reason="failed"})"), 0);
  EXPECT_EQ(of("tokens", "target"), tokens);
  EXPECT_EQ(get(server.port(), "/health").status, 200);
  server.stop();

  std::ifstream in(folder / "access.jsonl");
  std::vector<json> lines;
  for (std::string line; std::getline(in, line);) {
    lines.push_back(json::parse(line));
    if (!lines.back().contains("id")) lines.pop_back();
  }
  ASSERT_EQ(lines.size(), 2U);
  EXPECT_EQ(lines[0]["verifications"], passes);
  EXPECT_NEAR(lines[0]["tokens_per_verification"].get<double>(), tokens / passes, 0.006);
  EXPECT_FALSE(lines[1].contains("verifications"));
  TinyServer plain;
  plain.open();
  EXPECT_THAT(get(plain.port(), "/metrics").body, ::testing::Not(HasSubstr("speculative")));
}

// A named seed is a promise: by ratios such texts go plainly, under shared noise all texts are the seed's.
TEST(ServedSpeculation, ASeedGivesTheSameTextWhoeverElseIsThere) {
  for (const bool noise : {false, true}) {
    SpeculationOptions options = kRetrieval;
    if (noise) options.tokens = RowRule::Tokens::SharedNoise;
    TinyServer plain({.shared_noise = noise}), server({.speculation = options, .shared_noise = noise});
    plain.open();
    server.open();
    const Ask ask{
        .body = {{"prompt", long_prompt(6, 80)}, {"max_tokens", 80}, {"temperature", 1}, {"seed", 11}}};
    const json expected = answer(plain, ask);
    EXPECT_EQ(answer(server, ask), expected);
    std::thread other([&] {
      for (int i = 0; i < 8; ++i) answer(server, {.body = {{"prompt", "z"}, {"max_tokens", 7}}});
    });
    for (int i = 0; i < 4; ++i) EXPECT_EQ(answer(server, ask), expected);
    other.join();
    EXPECT_EQ(server.metric(R"(fathom_speculative_tokens_total{level="target"})") > 100, noise);
  }
}

std::int64_t draws(std::int64_t usual) {
  const char* given = std::getenv("FATHOM_SPECULATION_DRAWS");
  return given == nullptr ? usual : std::atoll(given);
}

// Four letters at temperature 1, by two clients who are in each other's way; a chi-squared against what the
// model says of them.
TEST(ServedSpeculation, DrawnAnswersHaveTheModelsDistribution) {
  TinyServer server({.speculation = kRetrieval});
  server.open();
  constexpr std::int64_t kLetters = 3, kTokens = 4;
  const std::string prompt = long_prompt(7, 60);
  const json body = {{"prompt", prompt},
                     {"max_tokens", kTokens},
                     {"temperature", 1},
                     {"n", 1},
                     {"logit_bias", {{"97", 100}, {"98", 100}, {"99", 100}}}};
  const std::int64_t each = draws(1000);
  std::vector<std::map<std::string, std::int64_t>> found(2);
  std::vector<std::thread> clients;
  for (std::size_t c = 0; c < 2; ++c) {
    clients.emplace_back([&, c] {
      for (std::int64_t i = 0; i < each; ++i) {
        ++found[c][post(server.port(), "/v1/completions", body).json()["choices"][0]["text"]];
        // The first is alone for a while.
        if (c == 1) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_GT(server.metric(R"(fathom_speculative_accepted_tokens_total{level="target"})"), each / 4);
  server.stop();

  TinyModel& m = server.model();
  std::map<std::string, double> expected{{"", 1.0}};
  for (std::int64_t n = 0; n < kTokens; ++n) {
    std::map<std::string, double> longer;
    for (const auto& [text, weight] : expected) {
      const std::vector<std::int32_t> ids = m.tokenizer.encode(prompt + text);
      const std::vector<float> logits = causal_logits(m.c, m.model, ids, m.rule);
      const float* last = logits.data() + logits.size() - 272 + 'a';
      double sum = 0;
      for (std::int64_t i = 0; i < kLetters; ++i) sum += std::exp(double{last[i]});
      for (std::int64_t i = 0; i < kLetters; ++i)
        longer[text + static_cast<char>('a' + i)] += weight * std::exp(double{last[i]}) / sum;
    }
    expected = std::move(longer);
  }
  double chi = 0, degrees = -1, rare = 0, rare_found = 0;
  const auto add = [&](double count, double wanted) {
    chi += (count - wanted) * (count - wanted) / wanted;
    ++degrees;
  };
  for (const auto& [text, p] : expected) {
    const double wanted = p * 2 * static_cast<double>(each);
    const auto count = static_cast<double>(found[0][text] + found[1][text]);
    if (wanted < 8) {
      rare += wanted, rare_found += count;
    } else {
      add(count, wanted);
    }
  }
  if (rare > 0) add(rare_found, rare);
  RecordProperty("chi_squared", fmt::format("{:.1f}, {} degrees", chi, degrees));
  EXPECT_GT(degrees, 10);
  EXPECT_LT(chi, degrees + 4.5 * std::sqrt(2 * degrees));
}

TEST(ServedSpeculation, DrainsInTheMidstOfIt) {
  TinyServer server({.speculation = kRetrieval});
  server.open();
  Connection client(server.port());
  client.send(request_text(
      "POST", "/v1/completions",
      json{{"prompt", long_prompt(6, 80)}, {"max_tokens", 400}, {"temperature", 0}, {"ignore_eos", true}}
          .dump()));
  EXPECT_TRUE(server.comes_to("fathom_requests_running", 1));
  std::thread stopping([&] { server.stop(); });
  const Response r = client.read();
  stopping.join();
  EXPECT_EQ(r.json()["usage"]["completion_tokens"], 400);
  EXPECT_EQ(server.stats().free_blocks, server.stats().blocks);
}

}  // namespace
}  // namespace fathom::serve
