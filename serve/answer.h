// One request on its way out: collects what the engine writes, and sends it whole or piece by piece.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "serve/answer_format.h"
#include "serve/http/exchange.h"
#include "serve/job.h"
#include "serve/served_model.h"

namespace fathom::serve {

struct AnswerPlan {
  AnswerHead head;
  std::unique_ptr<AnswerFormat> format;
  std::vector<PreparedPrompt> prompts;
  std::int64_t n = 1;  // texts of each prompt
  bool echo = false, stream = false, include_usage = false, logprobs = false;
  bool scores_only = false;  // max_tokens 0
  bool routing = false;      // which layers computed which token
};

/// Made on the exchange's strand; hears of its job on the engine's thread, and goes back to the strand.
class Answer final : public JobListener, public std::enable_shared_from_this<Answer> {
 public:
  Answer(std::shared_ptr<HttpExchange> exchange, AnswerPlan plan, const ServedModel& model);

  void updated(std::vector<TextUpdate> updates) override;
  void failed(const ApiError& error) override;

 private:
  struct Choice {
    std::string text;
    std::vector<ShownToken> tokens;
    std::vector<double> prompt_logprobs;
    std::vector<std::vector<SampledToken>> prompt_alternatives;
    Finish finish = Finish::None;
    bool is_begun = false;  // of a stream: its first piece is out
    ShownRouting routing;   // of tokens that the client has not heard of
  };

  void take(TextUpdate update);
  void add_routing(Choice& c, ChoicePart& part) const;
  void add_prompt(std::size_t index, ChoicePart& part) const;
  void send(const std::string& json);
  void finish();
  void fail(const ApiError& error);
  const PreparedPrompt& prompt_of(std::size_t text) const {
    return plan_.prompts[text / static_cast<std::size_t>(plan_.n)];
  }

  const std::shared_ptr<HttpExchange> exchange_;
  const AnswerPlan plan_;
  const ServedModel& model_;
  std::vector<Choice> choices_;
  std::size_t left_;
  // Of the engine's thread, where the answer is no stream:
  std::size_t unfinished_;
  std::vector<TextUpdate> held_;
  bool is_begun_ = false;
  Usage usage_;
  double routed_tokens_ = 0;  // the weight of usage_'s fractions
};

/// An API error as an HTTP answer.
HttpReply reply_of(const ApiError& error);
/// JSON, whatever bytes its strings have.
HttpReply json_reply(const nlohmann::json& body);

}  // namespace fathom::serve
