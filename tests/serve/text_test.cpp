// What of a text a client sees, and the formats around it: without sockets.
#include <gmock/gmock.h>
#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "serve/access_log.h"
#include "serve/answer_text.h"
#include "serve/api_error.h"
#include "serve/api_keys.h"
#include "serve/completion_request.h"
#include "serve/json_fields.h"
#include "serve/metrics.h"
#include "serve/serve_metrics.h"
#include "serve/token_texts.h"
#include "serve/utf8_gate.h"
#include "src/core/splitmix64.h"
#include "src/io/utf8.h"

namespace fathom::serve {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

TEST(Utf8Gate, PassesWholeCharactersAndTheSameInAll) {
  SplitMix64 random(3);
  const std::string good = "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80";
  for (int round = 0; round < 3000; ++round) {
    std::string bytes;
    for (std::size_t i = random.below(12); i > 0; --i) {
      if (random.below(2) == 0) {
        bytes += good.substr(random.below(good.size()), 1 + random.below(4));
      } else {
        bytes += static_cast<char>(random.below(256));
      }
    }
    Utf8Gate gate;
    std::string passed;
    for (std::size_t at = 0; at < bytes.size();) {
      const std::size_t n = 1 + random.below(3);
      const std::string piece = gate.pass(bytes.substr(at, n));
      ASSERT_EQ(utf8_prefix(piece), piece.size());
      passed += piece;
      at += n;
    }
    passed += gate.rest();
    ASSERT_EQ(passed, replace_invalid_utf8(bytes)) << testing::PrintToString(bytes);
  }
}

TEST(Utf8Gate, WaitsForTheRestOfACharacterAndNoLonger) {
  Utf8Gate gate;
  EXPECT_EQ(gate.pass("\xF0\x9F\x98"), "");
  EXPECT_EQ(gate.pass("\x80!"), "\xF0\x9F\x98\x80!");
  EXPECT_EQ(gate.pass("\xE2"), "");
  EXPECT_EQ(gate.pass("a"),
            "\xEF\xBF\xBD"
            "a");
  EXPECT_EQ(gate.pass("\xF0\x80"), "\xEF\xBF\xBD");  // an overlong form, whatever follows
}

std::vector<std::string> pieces(const std::string& text, std::vector<std::string> stops, bool trims = false) {
  const ByteTokenizer bytes;
  AnswerText answer(bytes, std::move(stops), {}, trims);
  std::vector<std::string> all;
  for (const char c : text) {
    all.push_back(answer.add({static_cast<unsigned char>(c), -1}, {}).text);
    if (answer.stopped()) return all;
  }
  all.push_back(answer.rest().text);
  return all;
}

TEST(AnswerText, HoldsBackWhatMayBecomeAStopString) {
  EXPECT_THAT(pieces("a##b", {"###"}), ::testing::ElementsAre("a", "", "", "##b", ""));
  EXPECT_THAT(pieces("a###", {"###"}), ::testing::ElementsAre("a", "", "", ""));
  EXPECT_THAT(pieces("a##", {"###"}), ::testing::ElementsAre("a", "", "", "##"));
  EXPECT_THAT(pieces("\xC3\xA9x", {}), ::testing::ElementsAre("", "\xC3\xA9", "x", ""));
  EXPECT_THAT(pieces(" \nhi ", {}, true), ::testing::ElementsAre("", "", "h", "i", " ", ""));
}

TEST(AnswerText, ShowsTokensWithTheTextThatTheyBeginIn) {
  const ByteTokenizer bytes;
  AnswerText answer(bytes, {"##"}, {}, false);
  EXPECT_EQ(answer.add({0xC3, -1}, {}).tokens.size(), 1u);  // TextStream knows nothing of characters
  EXPECT_EQ(answer.add({0xA9, -2}, {}).tokens.size(), 1u);
  EXPECT_TRUE(answer.add({'#', -3}, {}).tokens.empty());
  const Piece piece = answer.add({'x', -4}, {});
  ASSERT_EQ(piece.tokens.size(), 2u);
  EXPECT_EQ(piece.tokens[0].token.logprob, -3);
  EXPECT_EQ(piece.tokens[1].begins, 3);
  EXPECT_EQ(piece.tokens[1].position, 2);
  answer.add({'#', -5}, {});
  EXPECT_TRUE(answer.add({'#', -6}, {}).tokens.empty());
  EXPECT_TRUE(answer.stopped());
}

TEST(TokenTexts, WriteHalfCharactersAsBytes) {
  const ByteTokenizer bytes;
  const TokenTexts texts(bytes);
  EXPECT_EQ(texts.shown('a'), "a");
  EXPECT_EQ(texts.shown(0xC3), "bytes:\\xc3");
  EXPECT_EQ(texts.shown(256), "<end of document>");
}

TEST(Requests, ReadAllThatOpenAiHas) {
  const RequestLimits limits{.vocab = 300, .context = 100};
  const CompletionRequest r = parse_completion(
      R"({"model":"m","prompt":["a","b"],"max_tokens":7,"temperature":0.5,"top_p":0.9,"n":2,"stream":true,
          "stream_options":{"include_usage":true},"logprobs":3,"echo":true,"stop":"x","presence_penalty":1,
          "frequency_penalty":-1,"best_of":2,"logit_bias":{"5":-100,"6":2.5},"user":"u","seed":-1,"suffix":null,
          "top_k":-1,"min_p":0.1,"repetition_penalty":1.1})",
      limits);
  EXPECT_EQ(r.prompts.size(), 2u);
  EXPECT_EQ(r.options.max_tokens, 7);
  EXPECT_EQ(r.options.seed, ~std::uint64_t{0});
  EXPECT_EQ(r.options.sampling.top_k, 0);
  EXPECT_EQ(r.options.sampling.logit_bias.at(5), -1e9);
  EXPECT_EQ(r.options.sampling.logit_bias.at(6), 2.5);
  EXPECT_EQ(r.options.stops, std::vector<std::string>{"x"});
  EXPECT_TRUE(r.options.include_usage && r.echo);
  const CompletionRequest plain = parse_completion("{}", limits);
  EXPECT_EQ(plain.options.sampling.temperature, 1);
  EXPECT_EQ(plain.options.logprobs, -1);
  EXPECT_FALSE(plain.options.max_tokens || plain.options.seed);
}

TEST(Requests, OfNestedOrBrokenJsonAreRefused) {
  const RequestLimits limits{.vocab = 300, .context = 100};
  for (const std::string& body :
       {std::string("{"), std::string(), std::string("null"), std::string(100000, '['),
        "{\"logit_bias\":{\"1\":" + std::string(40, '[') + std::string(40, ']') + "}}",
        std::string("{\"a\":1e999}"), std::string("{\"prompt\":\"\xC3\"}")}) {
    EXPECT_THROW(parse_completion(body, limits), ApiError) << body.substr(0, 40);
  }
}

// An error says what came, so that whoever wrote the request finds it.
TEST(Requests, AreRefusedWithWhatTheySay) {
  const RequestLimits limits{.vocab = 300, .context = 100};
  const auto why = [&](const std::string& body) -> std::string {
    try {
      parse_completion(body, limits);
    } catch (const ApiError& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_EQ(why(R"({"stream":"true"})"), "'stream' is the string \"true\": expected true or false.");
  EXPECT_EQ(why(R"({"n":true})"), "'n' is true: expected a whole number.");
  EXPECT_EQ(why(R"({"n":[1]})"), "'n' is an array: expected a whole number.");
  EXPECT_EQ(why(R"({"n":1.5})"), "'n' is 1.5: expected a whole number.");
  EXPECT_EQ(why(R"({"n":1e30})"), "'n' is 1e+30: expected from 1 to 128.");
  EXPECT_EQ(why(R"({"max_tokens":-1000000000000000000000000000000})"),
            "'max_tokens' is -1e+30: expected from 0 to 2147483647.");
  EXPECT_EQ(why(R"({"seed":9223372036854775808})"),
            "'seed' is 9223372036854775808: expected a whole number of 64 bits.");
  EXPECT_EQ(why(R"({"seed":1e30})"), "'seed' is 1e+30: expected a whole number of 64 bits.");
  EXPECT_EQ(why(R"({"logit_bias":[]})"),
            "'logit_bias' is an array: expected an object such as {\"50\": -100}.");
  EXPECT_EQ(why(R"({"stop":["a",{}]})"), "'stop' holds an object: expected a string, or up to 4 of them.");
  EXPECT_THAT(why(R"({"prompt":{}})"), HasSubstr("'prompt' is an object: expected"));
  EXPECT_EQ(why("\"" + std::string(1000, 'x') + "\""),
            "The body is the string \"" + std::string(31, 'x') + "...: expected a JSON object.");
}

TEST(ApiKeys, AdmitTheKeysAlone) {
  EXPECT_TRUE(ApiKeys().admit(""));
  const ApiKeys keys({"secret", "other"});
  EXPECT_TRUE(keys.admit("Bearer secret"));
  EXPECT_TRUE(keys.admit("bearer other"));
  for (const char* wrong :
       {"", "Bearer ", "Bearer secre", "Bearer secretsecret", "Bearer Secret", "secret", "Basic  secret"})
    EXPECT_FALSE(keys.admit(wrong)) << wrong;
  EXPECT_THROW(ApiKeys({"two words"}), UserError);
}

TEST(Metrics, HaveTheTextFormat) {
  Histogram h({0.1, 1});
  for (const double x : {0.05, 0.1, 0.5, 7.0}) h.observe(x);
  MetricsText out;
  out.histogram("t_seconds", "How long.", h);
  out.family("g", "gauge", "back\\slash");
  out.sample(2, {{"path", "a\"b\\\n"}, {"n", "1"}});
  EXPECT_EQ(out.text(),
            "# HELP t_seconds How long.\n# TYPE t_seconds histogram\n"
            "t_seconds_bucket{le=\"0.1\"} 2\nt_seconds_bucket{le=\"1\"} 3\nt_seconds_bucket{le=\"+Inf\"} 4\n"
            "t_seconds_sum 7.65\nt_seconds_count 4\n"
            "# HELP g back\\\\slash\n# TYPE g gauge\ng{path=\"a\\\"b\\\\\\n\",n=\"1\"} 2\n");
}

TEST(Metrics, NameEachFamilyOnceAndBeforeItsSamples) {
  ServeMetrics metrics;
  metrics.observe_first_token(0.2);
  metrics.count_http("/health", 200);
  EngineStats stats;
  stats.rows = 10;
  stats.routed_rows = {4, 5};
  const std::string text = metrics.text(stats, {1, 3});
  EXPECT_THAT(text, HasSubstr("\nfathom_routed_fraction{layer=\"3\"} 0.5\n"));
  EXPECT_THAT(text, HasSubstr("fathom_time_to_first_token_seconds_bucket{le=\"0.25\"} 1\n"));
  std::set<std::string> families;
  std::istringstream lines(text);
  std::string family;
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind("# TYPE ", 0) == 0) {
      family = line.substr(7, line.find(' ', 7) - 7);
      EXPECT_TRUE(families.insert(family).second) << family;
    } else if (line[0] != '#') {
      EXPECT_EQ(line.substr(0, family.size()), family);
    }
  }
}

TEST(AccessLog, LinesAreJsonWhateverAClientSends) {
  HttpRequest request;
  request.method = "GET";
  request.path = "/\xFF\"\n";
  const json line =
      json::parse(access_line("now", request, {.id = "cmpl-1", .prompt_tokens = 3}, 404, 12, 0.25));
  EXPECT_EQ(line["status"], 404);
  EXPECT_EQ(line["prompt_tokens"], 3);
  EXPECT_FALSE(line.contains("completion_tokens"));
  EXPECT_FALSE(line.contains("end"));
}

}  // namespace
}  // namespace fathom::serve
