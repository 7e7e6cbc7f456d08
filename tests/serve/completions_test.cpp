// /v1/completions as a client sees it, from a real server.
#include <cmath>
#include <thread>

#include <gmock/gmock.h>

#include "src/io/utf8.h"
#include "tests/serve/tiny_server.h"

namespace fathom::serve {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

class Completions : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    server_ = new TinyServer();
    server_->open();
  }
  static void TearDownTestSuite() {
    delete server_;
    server_ = nullptr;
  }

  static json complete(const json& body) {
    const Response r = post(server_->port(), "/v1/completions", body);
    EXPECT_EQ(r.status, 200) << r.body;
    return r.json();
  }
  static std::string text_of(const json& body) { return complete(body)["choices"][0]["text"]; }
  /// What a stream says in all, by choice.
  static std::map<int, std::string> streamed(json body) {
    body["stream"] = true;
    std::map<int, std::string> texts;
    for (const json& event : post(server_->port(), "/v1/completions", body).events()) {
      for (const json& choice : event["choices"]) {
        const std::string text = choice["text"];
        EXPECT_EQ(utf8_prefix(text), text.size());
        texts[choice["index"].get<int>()] += text;
      }
    }
    return texts;
  }
  /// A refusal in OpenAI's shape.
  static void expect_error(const json& body, int status, const std::string& param, const std::string& words) {
    const Response r = post(server_->port(), "/v1/completions", body);
    EXPECT_EQ(r.status, status) << body << r.body;
    const json error = r.json()["error"];
    EXPECT_THAT(error["message"].get<std::string>(), HasSubstr(words));
    EXPECT_EQ(error["type"], "invalid_request_error");
    EXPECT_EQ(error["param"], param.empty() ? json() : json(param));
    EXPECT_TRUE(error.contains("code"));
  }

  static inline TinyServer* server_ = nullptr;
};

// Harnesses that score a text ask for one token more and leave the last one of the lists out, whatever it is.
TEST_F(Completions, TheEndOfADocumentIsAmongTheTokensButNoText) {
  json body = {{"prompt", {104, 105}}, {"max_tokens", 5}, {"temperature", 0},
               {"logprobs", 2},        {"echo", true},    {"logit_bias", {{"256", 100}}}};
  const json r = complete(body);
  const json& choice = r["choices"][0];
  EXPECT_EQ(choice["text"], "hi");
  EXPECT_EQ(choice["finish_reason"], "stop");
  const json& lists = choice["logprobs"];
  ASSERT_EQ(lists["tokens"].size(), 3u);
  EXPECT_EQ(lists["tokens"][2], ByteTokenizer().piece(256));
  EXPECT_LT(lists["token_logprobs"][2].get<double>(), 0);
  EXPECT_GE(lists["top_logprobs"][2].size(), 2u);
  EXPECT_EQ(lists["text_offset"], json({0, 1, 2}));
  EXPECT_EQ(r["usage"]["completion_tokens"], 0);
  EXPECT_EQ(streamed(body), (std::map<int, std::string>{{0, "hi"}}));
  const json chat = post(server_->port(), "/v1/chat/completions",
                         {{"messages", {{{"role", "user"}, {"content", "b"}}}},
                          {"logprobs", true},
                          {"temperature", 0},
                          {"logit_bias", {{"256", 100}}}})
                        .json();
  EXPECT_EQ(chat["choices"][0]["logprobs"]["content"], json::array());
}

TEST_F(Completions, SayWhatControlTokensAre) {
  const json info = get(server_->port(), "/tokenizer_info").json();
  EXPECT_EQ(info["eos_token_id"], 256);
  EXPECT_EQ(info["bos_token"], json());
  EXPECT_EQ(info["model_max_length"], 512);
  const auto ids = [](const json& text, bool special) {
    return post(server_->port(), "/tokenize", {{"prompt", text}, {"add_special_tokens", special}})
        .json()["tokens"];
  };
  EXPECT_EQ(ids(info["eos_token"], false), json({256}));
  EXPECT_GT(ids(info["eos_token"], true).size(), 1u);
  EXPECT_EQ(ids("ab", false), json({97, 98}));
}

TEST_F(Completions, HaveTheShapeOfOpenAi) {
  const json r = complete({{"model", "tiny"}, {"prompt", "The sea"}, {"max_tokens", 5}, {"temperature", 0}});
  EXPECT_EQ(r["object"], "text_completion");
  EXPECT_EQ(r["model"], "tiny");
  EXPECT_EQ(r["id"].get<std::string>().substr(0, 5), "cmpl-");
  ASSERT_EQ(r["choices"].size(), 1u);
  EXPECT_EQ(r["choices"][0]["finish_reason"], "length");
  EXPECT_TRUE(r["choices"][0]["logprobs"].is_null());
  EXPECT_EQ(r["usage"]["prompt_tokens"], 7);
  EXPECT_EQ(r["usage"]["completion_tokens"], 5);
  EXPECT_EQ(r["usage"]["total_tokens"], 12);
  EXPECT_GT(r["usage"]["routed_fraction"], 0);
  EXPECT_LT(r["usage"]["routed_fraction"], 1);
}

TEST_F(Completions, TakePromptsOfEveryKind) {
  const json one = {{"prompt", "ab"}, {"max_tokens", 8}, {"temperature", 0}};
  const std::string expected = text_of(one);
  json other = one;
  other["prompt"] = {97, 98};
  EXPECT_EQ(text_of(other), expected);
  other["prompt"] = {"xyz", "ab"};
  const json both = complete(other);
  ASSERT_EQ(both["choices"].size(), 2u);
  EXPECT_EQ(both["choices"][1]["text"], expected);
  EXPECT_EQ(both["choices"][1]["index"], 1);
  EXPECT_EQ(both["usage"]["prompt_tokens"], 5);
  other["prompt"] = {{120, 121, 122}, {97, 98}};
  EXPECT_EQ(complete(other)["choices"], both["choices"]);
  other.erase("prompt");  // a new document
  EXPECT_EQ(complete(other)["usage"]["prompt_tokens"], 1);
}

TEST_F(Completions, StreamsSayWhatWholeAnswersDo) {
  for (const int seed : {1, 2, 3}) {
    const json body = {{"prompt", {"Once", "a\xC3\xA9"}},
                       {"max_tokens", 60},
                       {"temperature", 1.2},
                       {"seed", seed},
                       {"n", 2},
                       {"echo", seed == 2}};
    const json whole = complete(body);
    const std::map<int, std::string> pieces = streamed(body);
    ASSERT_EQ(pieces.size(), 4u);
    for (const json& choice : whole["choices"])
      EXPECT_EQ(pieces.at(choice["index"].get<int>()), choice["text"].get<std::string>());
    EXPECT_NE(whole["choices"][0]["text"], whole["choices"][1]["text"]);
  }
}

TEST_F(Completions, SeedsGiveTheSameAgainWhateverN) {
  json body = {{"prompt", "q"}, {"max_tokens", 20}, {"seed", -7}};
  const std::string alone = text_of(body);
  body["n"] = 3;
  const json three = complete(body);
  EXPECT_EQ(three["choices"][0]["text"], alone);
  EXPECT_EQ(complete(body)["choices"], three["choices"]);
  body.erase("seed");
  EXPECT_NE(complete(body)["choices"], complete(body)["choices"]);
}

TEST_F(Completions, StopStringsAreNoPartOfTheAnswer) {
  const json body = {{"prompt", "stop here"}, {"max_tokens", 200}, {"seed", 5}, {"temperature", 1}};
  const std::string text = text_of(body);
  ASSERT_GT(text.size(), 40u);
  int found = 0;
  for (std::size_t at = 4; at + 2 < text.size(); ++at) {
    const std::string stop = text.substr(at, 2);
    if (stop[0] <= 0 || stop[1] <= 0) continue;  // it may be what stands for bytes that are no character
    json stopped = body;
    stopped["stop"] = {"never in it", stop};
    const json r = complete(stopped);
    const std::string expected = text.substr(0, text.find(stop));
    EXPECT_EQ(r["choices"][0]["text"], expected);
    EXPECT_EQ(r["choices"][0]["finish_reason"], "stop");
    EXPECT_EQ(streamed(stopped)[0], expected);
    ++found;
  }
  EXPECT_GT(found, 2);
}

TEST_F(Completions, LogprobsHaveTheLegacyShape) {
  const json body = {
      {"prompt", "abc"}, {"max_tokens", 4}, {"temperature", 0}, {"logprobs", 2}, {"echo", true}};
  const json r = complete(body);
  const json lp = r["choices"][0]["logprobs"];
  ASSERT_EQ(lp["tokens"].size(), 7u);
  EXPECT_EQ(lp["tokens"][0], "a");
  EXPECT_TRUE(lp["token_logprobs"][0].is_null());
  EXPECT_TRUE(lp["top_logprobs"][0].is_null());
  EXPECT_EQ(lp["text_offset"][3], 3);
  for (std::size_t i = 1; i < 7; ++i) {
    EXPECT_LT(lp["token_logprobs"][i], 0);
    EXPECT_GE(lp["top_logprobs"][i].size(), 2u);
    // The token's own is there too.
    EXPECT_TRUE(lp["top_logprobs"][i].contains(lp["tokens"][i].get<std::string>()));
    if (i < 3) continue;
    EXPECT_EQ(lp["top_logprobs"][i].size(), 2u) << "greedy tokens are the likeliest";
  }
  // What was chosen, scored as a prompt, has the same log-probabilities.
  json scored = body;
  const json tokens =
      post(server_->port(), "/tokenize", {{"prompt", r["choices"][0]["text"]}}).json()["tokens"];
  if (tokens.size() == 7) {
    scored["prompt"] = tokens;
    scored["max_tokens"] = 0;
    const json again = complete(scored)["choices"][0]["logprobs"];
    ASSERT_EQ(again["tokens"].size(), 7u);
    for (std::size_t i = 1; i < 7; ++i)
      EXPECT_NEAR(again["token_logprobs"][i].get<double>(), lp["token_logprobs"][i].get<double>(), 1e-6);
  }
  // A stream has the same lists in pieces.
  json stream = body;
  stream["stream"] = true;
  json names = json::array(), offsets = json::array();
  for (const json& e : post(server_->port(), "/v1/completions", stream).events()) {
    for (const json& t : e["choices"][0]["logprobs"]["tokens"]) names.push_back(t);
    for (const json& t : e["choices"][0]["logprobs"]["text_offset"]) offsets.push_back(t);
  }
  EXPECT_EQ(names, lp["tokens"]);
  EXPECT_EQ(offsets, lp["text_offset"]);
}

TEST_F(Completions, UsageComesAtTheEndOfAStreamIfAsked) {
  const auto events = post(server_->port(), "/v1/completions",
                           {{"prompt", "ab"},
                            {"max_tokens", 3},
                            {"stream", true},
                            {"ignore_eos", true},
                            {"stream_options", {{"include_usage", true}}}})
                          .events();
  ASSERT_GE(events.size(), 2u);
  EXPECT_TRUE(events.front().at("usage").is_null());
  EXPECT_TRUE(events.back()["choices"].empty());
  EXPECT_EQ(events.back()["usage"]["completion_tokens"], 3);
}

TEST_F(Completions, ThresholdsSayHowDeepATextGoes) {
  const auto usage = [](const json& threshold) {
    return complete({{"prompt", std::string(60, 'q')},
                     {"max_tokens", 20},
                     {"temperature", 0},
                     {"routing_threshold", threshold}})["usage"];
  };
  const double usual = usage(nullptr)["routed_fraction"];
  EXPECT_GT(usage(0.1)["routed_fraction"], usual);
  EXPECT_LT(usage(0.9)["routed_fraction"], usual);
  EXPECT_EQ(usage(TinyModel::kThreshold)["routed_fraction"], usual);
}

TEST_F(Completions, SayWhatWasInTheCache) {
  json body = {{"prompt", std::string(100, 'z') + "!"}, {"max_tokens", 5}, {"temperature", 0}};
  const auto cached = [&] { return complete(body)["usage"]["prompt_tokens_details"]["cached_tokens"]; };
  const std::string text = text_of(body);
  EXPECT_EQ(cached(), 96);
  EXPECT_EQ(text_of(body), text);
  body["cache_prompt"] = false;
  EXPECT_EQ(cached(), 0);
  EXPECT_EQ(text_of(body), text);
  body["cache_prompt"] = true;
  body["n"] = 3;  // a prompt counts once
  EXPECT_EQ(cached(), 96);
  body["routing_threshold"] = 0.2;
  EXPECT_EQ(cached(), 0);
}

TEST_F(Completions, SayWhichLayersComputedWhichToken) {
  json body = {{"prompt", "Where does it go?"},
               {"max_tokens", 12},
               {"temperature", 0},
               {"ignore_eos", true},
               {"return_routing", true}};
  const json whole = complete(body);
  const json routing = whole["choices"][0]["routing"];
  EXPECT_EQ(routing["layers"], whole["usage"]["routed_layers"]);
  EXPECT_EQ(routing["first"], 0);
  // All tokens but the one that was chosen last.
  const std::vector<std::string> kept = routing["kept"];
  ASSERT_EQ(kept.size(), whole["usage"]["total_tokens"].get<std::size_t>() - 1);
  for (std::size_t i = 0; i < 2; ++i) {
    double sum = 0;
    for (const std::string& token : kept) sum += token.at(i) == '1' ? 1 : 0;
    EXPECT_NEAR(sum / static_cast<double>(kept.size()), whole["usage"]["routed_fraction_by_layer"][i], 1e-9);
  }
  // A stream's pieces say the same, each where it goes on; and so does a text that found some in the cache.
  body["stream"] = true;
  std::vector<std::string> pieces;
  for (const json& event : post(server_->port(), "/v1/completions", body).events()) {
    const json& part = event["choices"][0]["routing"];
    EXPECT_EQ(part["first"], pieces.size());
    for (const json& token : part["kept"]) pieces.push_back(token);
  }
  EXPECT_EQ(pieces, kept);
  EXPECT_FALSE(complete({{"prompt", "a"}, {"max_tokens", 2}})["choices"][0].contains("routing"));
}

TEST_F(Completions, BiasesAndPenaltiesReachTheEngine) {
  const json body = {{"prompt", "ab"}, {"max_tokens", 6}, {"temperature", 0}, {"logit_bias", {{"120", 100}}}};
  EXPECT_EQ(text_of(body), "xxxxxx");
  json penalised = body;
  penalised["logit_bias"] = {{"120", 60}, {"121", 59}};
  EXPECT_EQ(text_of(penalised), "xxxxxx");
  penalised["frequency_penalty"] = 2;
  EXPECT_THAT(text_of(penalised), HasSubstr("xy"));
}

TEST_F(Completions, RefuseInOpenAisShape) {
  expect_error({{"prompt", "a"}, {"temperature", 101}}, 400, "temperature", "from 0 to 100");
  expect_error({{"prompt", "a"}, {"temprature", 1}}, 400, "temprature", "Unrecognized");
  expect_error({{"prompt", "a"}, {"max_tokens", -1}}, 400, "max_tokens", "-1");
  expect_error({{"prompt", "a"}, {"max_tokens", 1.5}}, 400, "max_tokens", "whole number");
  expect_error({{"prompt", "a"}, {"suffix", "b"}}, 400, "suffix", "not supported");
  expect_error({{"prompt", "a"}, {"best_of", 4}}, 400, "best_of", "not supported");
  expect_error({{"prompt", "a"}, {"stop", {"1", "2", "3", "4", "5"}}}, 400, "stop", "at most 4");
  expect_error({{"prompt", "a"}, {"logprobs", 21}}, 400, "logprobs", "20");
  expect_error({{"prompt", "a"}, {"n", 129}}, 400, "n", "128");
  expect_error({{"prompt", {1, "a"}}}, 400, "prompt", "mixes");
  expect_error({{"prompt", {1, 300}}}, 400, "prompt", "300");
  expect_error({{"prompt", {{1}, json::array()}}}, 400, "prompt", "empty");
  expect_error({{"prompt", std::string(600, 'x')}}, 400, "prompt", "context is 512");
  expect_error({{"prompt", std::string(514, 'x')}, {"max_tokens", 0}}, 400, "prompt", "514");
  EXPECT_EQ(complete({{"prompt", std::string(513, 'x')}, {"max_tokens", 0}})["usage"]["prompt_tokens"], 513);
  expect_error({{"prompt", "a"}, {"max_tokens", 512}}, 400, "prompt", "513");
  expect_error({{"prompt", "a"}, {"logit_bias", {{"300", 1}}}}, 400, "logit_bias", "300");
  expect_error({{"prompt", "a"}, {"stream_options", {{"include_usage", true}}}}, 400, "stream_options",
               "stream");
  expect_error({{"prompt", "a"}, {"routing_threshold", 0.95}}, 400, "routing_threshold", "0.9");
  expect_error({{"prompt", "a"}, {"routing_threshold", "deep"}}, 400, "routing_threshold", "number");
  expect_error({{"prompt", "a"}, {"model", "gpt-4"}}, 404, "model", "gpt-4");
  expect_error(json::array(), 400, "", "JSON object");
}

TEST_F(Completions, OfManyClientsAreThoseOfEachAlone) {
  constexpr int kClients = 64;
  // Half of the prompts begin alike, at three thresholds and the server's; alone nothing is shared.
  const auto body = [](int i) {
    const std::string own(static_cast<std::size_t>(1 + i * 3 % 90), static_cast<char>('a' + i % 26));
    return json{{"prompt", i % 2 == 0 ? own : std::string(70, '~') + own},
                {"max_tokens", 40},
                {"temperature", 0},
                {"routing_threshold", i % 5 == 0 ? json() : json(0.15 * (i % 5))},
                {"logprobs", i % 3 == 0 ? 2 : 0}};
  };
  std::vector<std::string> alone(kClients), together(kClients);
  const auto choices = [&](int i, bool shares) {
    json request = body(i);
    request["cache_prompt"] = shares;
    return post(server_->port(), "/v1/completions", request).json()["choices"].dump();
  };
  const double hits = server_->metric("fathom_prefix_cache_hit_tokens_total");
  for (int i = 0; i < kClients; ++i) alone[static_cast<std::size_t>(i)] = choices(i, false);
  EXPECT_EQ(server_->metric("fathom_prefix_cache_hit_tokens_total"), hits);
  std::vector<std::thread> clients;
  for (int i = 0; i < kClients; ++i)
    clients.emplace_back([&, i] { together[static_cast<std::size_t>(i)] = choices(i, true); });
  for (std::thread& t : clients) t.join();
  EXPECT_GT(server_->metric("fathom_prefix_cache_hit_tokens_total"), hits + 64 * 8);
  for (std::size_t i = 0; i < kClients; ++i) EXPECT_EQ(together[i], alone[i]) << i;
  EXPECT_TRUE(server_->all_blocks_free());
}

TEST_F(Completions, OtherRoutes) {
  const std::uint16_t port = server_->port();
  EXPECT_EQ(get(port, "/health").status, 200);
  const Response page = get(port, "/");
  EXPECT_EQ(page.status, 200);
  EXPECT_THAT(page.headers.at("content-security-policy"), HasSubstr("default-src 'none'"));
  for (const char* outside : {"src=", "href=", "http:", "https:", "@import", "url("})
    EXPECT_EQ(page.body.find(outside), std::string::npos) << outside;
  EXPECT_EQ(get(port, "/v1/models").json()["data"][0]["id"], "tiny");
  EXPECT_EQ(get(port, "/v1/models/tiny").json()["id"], "tiny");
  EXPECT_EQ(get(port, "/v1/models/other").status, 404);
  EXPECT_FALSE(get(port, "/version").json()["version"].get<std::string>().empty());
  EXPECT_EQ(get(port, "/nowhere?x=1").json()["error"]["code"], "unknown_url");
  const Response wrong = get(port, "/v1/completions");
  EXPECT_EQ(wrong.status, 405);
  EXPECT_EQ(wrong.headers.at("allow"), "POST");
  const json tokens = post(port, "/tokenize", {{"prompt", "h\xC3\xA9"}}).json();
  EXPECT_EQ(tokens["count"], 3);
  EXPECT_EQ(post(port, "/detokenize", {{"tokens", tokens["tokens"]}}).json()["prompt"], "h\xC3\xA9");
  EXPECT_EQ(post(port, "/detokenize", {{"tokens", {-1}}}).status, 400);
}

}  // namespace
}  // namespace fathom::serve
