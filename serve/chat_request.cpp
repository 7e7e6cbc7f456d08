#include "serve/chat_request.h"

#include <optional>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "serve/api_error.h"
#include "serve/json_fields.h"

namespace fathom::serve {

namespace {

using nlohmann::json;

const char* speaker_of(const std::optional<std::string>& role, const std::string& field) {
  if (role == "system" || role == "developer") return "System";
  if (role == "user") return "User";
  if (role == "assistant") return "Assistant";
  throw bad_field(
      field,
      fmt::format("'{}' is {}: expected system, developer, user or assistant (there are no tools here).",
                  field, role ? fmt::format("'{}'", role->substr(0, 32)) : "missing"),
      role ? "invalid_value" : "missing_required_parameter");
}

// A string, or parts of text.
std::string content_of(const json* content, const std::string& field) {
  if (content == nullptr) throw bad_field(field, fmt::format("'{}' is missing.", field), "invalid_type");
  if (content->is_string()) return content->get<std::string>();
  if (!content->is_array())
    throw bad_field(
        field,
        fmt::format("'{}' is {}: expected a string, or an array of parts.", field, described(*content)),
        "invalid_type");
  std::string text;
  for (std::size_t i = 0; i < content->size(); ++i) {
    JsonFields part((*content)[i], fmt::format("{}[{}]", field, i));
    const std::string type = part.text("type").value_or("");
    if (type != "text")
      throw bad_field(
          part.name_of("type"),
          fmt::format("'{}' is '{}': this model reads text alone.", part.name_of("type"), type.substr(0, 32)),
          "unsupported_parameter");
    const auto of_part = part.text("text");
    if (!of_part)
      throw bad_field(part.name_of("text"), fmt::format("'{}' is missing.", part.name_of("text")),
                      "missing_required_parameter");
    text += *of_part;
    part.refuse_others();
  }
  return text;
}

std::vector<ChatMessage> read_messages(JsonFields& fields) {
  const json* list = fields.find("messages");
  if (list != nullptr && !list->is_array())
    throw bad_field("messages",
                    fmt::format("'messages' is {}: expected an array of messages.", described(*list)),
                    "invalid_type");
  if (list == nullptr || list->empty())
    throw bad_field("messages", "'messages' is missing or empty: expected an array of messages.",
                    "missing_required_parameter");
  std::vector<ChatMessage> messages;
  for (std::size_t i = 0; i < list->size(); ++i) {
    JsonFields message((*list)[i], fmt::format("messages[{}]", i));
    ChatMessage m;
    m.speaker = speaker_of(message.text("role"), message.name_of("role"));
    m.content = content_of(message.find("content"), message.name_of("content"));
    message.ignore("name");
    message.refuse("refusal", "there is none to give back.");
    message.refuse("tool_calls", "there are no tools here.");
    message.refuse("function_call", "there are no tools here.");
    message.refuse("audio", "this model reads text alone.");
    message.refuse_others();
    messages.push_back(std::move(m));
  }
  return messages;
}

void read_format(JsonFields& fields) {
  const json* format = fields.find("response_format");
  if (format == nullptr) return;
  JsonFields of_format(*format, "response_format");
  if (of_format.text("type").value_or("text") != "text")
    throw bad_field("response_format", "'response_format' other than text is not supported here.",
                    "unsupported_parameter");
}

}  // namespace

ChatRequest parse_chat(std::string_view body, const RequestLimits& limits) {
  JsonFields fields(body);
  ChatRequest r;
  r.options = read_answer_options(fields, limits);
  const auto old_name = fields.integer("max_tokens", 1, INT32_MAX);
  const auto new_name = fields.integer("max_completion_tokens", 1, INT32_MAX);
  r.options.max_tokens = new_name ? new_name : old_name;
  const bool logprobs = fields.flag("logprobs", false);
  const auto top = fields.integer("top_logprobs", 0, limits.logprobs);
  if (top && !logprobs)
    throw bad_field("top_logprobs", "'top_logprobs' needs 'logprobs': true.", "invalid_value");
  r.options.logprobs = logprobs ? static_cast<int>(top.value_or(0)) : -1;
  r.messages = read_messages(fields);
  read_format(fields);
  for (const char* tools : {"tools", "functions", "function_call", "web_search_options"})
    fields.refuse(tools, "there are no tools here.");
  if (const auto choice = fields.find("tool_choice");
      choice != nullptr && *choice != "none" && *choice != "auto")
    throw bad_field("tool_choice", "'tool_choice' is not supported here: there are no tools.",
                    "unsupported_parameter");
  fields.refuse("audio", "this model writes text alone.");
  if (const auto kinds = fields.find("modalities"); kinds != nullptr && *kinds != json::array({"text"}))
    throw bad_field("modalities", "'modalities' is not supported here, other than [\"text\"].",
                    "unsupported_parameter");
  fields.refuse("reasoning_effort", "this model has one way to think.");
  fields.refuse("store", "nothing is kept here.");
  // Labels, and hints for other services.
  for (const char* label :
       {"metadata", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"})
    fields.ignore(label);
  fields.refuse_others();
  return r;
}

std::string chat_prompt(const std::vector<ChatMessage>& messages) {
  std::string text;
  for (const ChatMessage& m : messages) text += fmt::format("{}: {}\n\n", m.speaker, m.content);
  return text + "Assistant:";
}

}  // namespace fathom::serve
