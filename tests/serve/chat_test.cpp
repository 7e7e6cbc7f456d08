// /v1/chat/completions: what a base model reads of it, and its shapes.
#include <gmock/gmock.h>

#include "serve/chat_request.h"
#include "tests/serve/tiny_server.h"

namespace fathom::serve {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

const RequestLimits kLimits{.vocab = 300, .context = 100};

json chat_of(const json& messages) { return {{"messages", messages}}; }

TEST(ChatRequests, BecomeTheDocumentedText) {
  const json messages = {
      {{"role", "system"}, {"content", "Be brief."}},
      {{"role", "user"},
       {"content", {{{"type", "text"}, {"text", "Hel"}}, {{"type", "text"}, {"text", "lo"}}}}},
      {{"role", "assistant"}, {"content", "Hi."}},
      {{"role", "user"}, {"content", "Bye"}, {"name", "Ann"}}};
  const ChatRequest r = parse_chat(chat_of(messages).dump(), kLimits);
  EXPECT_EQ(chat_prompt(r.messages),
            "System: Be brief.\n\nUser: Hello\n\nAssistant: Hi.\n\nUser: Bye\n\nAssistant:");
}

void expect_refusal(const json& body, const std::string& param, const std::string& why = "") {
  try {
    parse_chat(body.dump(), kLimits);
    FAIL() << body;
  } catch (const ApiError& e) {
    EXPECT_EQ(e.parts().param, param) << e.what();
    EXPECT_THAT(e.what(), HasSubstr(why));
    EXPECT_EQ(e.status(), 400);
  }
}

TEST(ChatRequests, AreRefusedByTheFieldThatIsWrong) {
  const json hello = {{{"role", "user"}, {"content", "a"}}};
  expect_refusal(json::object(), "messages");
  expect_refusal(chat_of(json::array()), "messages");
  expect_refusal(chat_of({{{"role", "tool"}, {"content", "a"}}}), "messages[0].role");
  expect_refusal(chat_of({{{"role", "user"}}}), "messages[0].content");
  expect_refusal(chat_of({{{"role", "user"}, {"content", {{{"type", "image_url"}}}}}}),
                 "messages[0].content[0].type");
  // Never an empty word in place of one that is not there.
  expect_refusal(chat_of({{{"role", "user"}, {"content", {{{"type", "text"}}}}}}),
                 "messages[0].content[0].text", "missing");
  expect_refusal(chat_of({{{"content", "a"}}}), "messages[0].role", "missing");
  expect_refusal({{"messages", "hello"}}, "messages", "the string \"hello\"");
  expect_refusal({{"messages", hello}, {"tools", {1}}}, "tools");
  expect_refusal({{"messages", hello}, {"top_logprobs", 2}}, "top_logprobs");
  expect_refusal({{"messages", hello}, {"response_format", {{"type", "json_object"}}}}, "response_format");
  expect_refusal({{"messages", hello}, {"prompt", "a"}}, "prompt");
  expect_refusal({{"messages", hello}, {"max_tokens", 0}}, "max_tokens");
  EXPECT_NO_THROW(
      parse_chat(json{{"messages", hello}, {"tools", json::array()}, {"store", false}}.dump(), kLimits));
}

TEST(Chat, AnswersAndStreamsTheSame) {
  TinyServer server;
  server.open();
  json body = chat_of({{{"role", "user"}, {"content", "a"}}});
  body["max_tokens"] = 40;
  body["seed"] = 4;
  body["n"] = 2;
  body["logprobs"] = true;
  body["top_logprobs"] = 2;
  const json whole = post(server.port(), "/v1/chat/completions", body).json();
  EXPECT_EQ(whole["object"], "chat.completion");
  EXPECT_EQ(whole["id"].get<std::string>().substr(0, 9), "chatcmpl-");
  EXPECT_EQ(whole["usage"]["prompt_tokens"], std::string("User: a\n\nAssistant:").size());
  const json token = whole["choices"][0]["logprobs"]["content"][0];
  EXPECT_EQ(token["bytes"].size(), 1u);
  EXPECT_EQ(token["top_logprobs"].size(), 2u);
  EXPECT_LT(token["logprob"], 0);

  body["stream"] = true;
  std::map<int, std::string> texts;
  std::map<int, int> roles;
  for (const json& event : post(server.port(), "/v1/chat/completions", body).events()) {
    EXPECT_EQ(event["object"], "chat.completion.chunk");
    const json& choice = event["choices"][0];
    const int index = choice["index"];
    texts[index] += choice["delta"].value("content", "");
    roles[index] += choice["delta"].contains("role") ? 1 : 0;
  }
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(texts[i],
              whole["choices"][static_cast<std::size_t>(i)]["message"]["content"].get<std::string>());
    EXPECT_EQ(roles[i], 1);
  }
  // Without max_tokens a chat goes on to the end of the context, or of itself.
  const json open =
      post(server.port(), "/v1/chat/completions",
           {{"messages", {{{"role", "user"}, {"content", "b"}}}}, {"ignore_eos", true}, {"temperature", 0}})
          .json();
  const bool at_the_end = open["choices"][0]["finish_reason"] == "length";
  EXPECT_EQ(at_the_end, open["usage"]["total_tokens"] == 512);
  const Response long_one = post(server.port(), "/v1/chat/completions",
                                 chat_of({{{"role", "user"}, {"content", std::string(600, 'x')}}}));
  EXPECT_EQ(long_one.json()["error"]["param"], "messages");
  EXPECT_EQ(long_one.json()["error"]["code"], "context_length_exceeded");
}

}  // namespace
}  // namespace fathom::serve
