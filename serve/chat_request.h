// What a client asks of /v1/chat/completions, and the text that a base model goes on with.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "serve/completion_request.h"

namespace fathom::serve {

struct ChatMessage {
  std::string speaker;  // "System", "User" or "Assistant"
  std::string content;
};

struct ChatRequest {
  AnswerOptions options;
  std::vector<ChatMessage> messages;
};

/// ApiError, with the field that is wrong.
ChatRequest parse_chat(std::string_view body, const RequestLimits& limits);

/// Each message as "Speaker: content" and an empty line, then "Assistant:", which the model goes on from. It
/// is a text such as base models have read; a model knows nothing of it but what its training had.
std::string chat_prompt(const std::vector<ChatMessage>& messages);
/// What ends an answer, beside the client's own stop strings: the model writing the user's part.
inline constexpr const char* kChatStop = "\nUser:";

}  // namespace fathom::serve
