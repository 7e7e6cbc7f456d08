#include "serve/answer.h"

#include <cmath>
#include <iterator>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace fathom::serve {

HttpReply reply_of(const ApiError& error) {
  HttpReply reply{.status = error.status(), .body = error.json()};
  if (error.parts().retry_after > 0)
    reply.headers.emplace_back("Retry-After", std::to_string(error.parts().retry_after));
  if (error.status() == 401) reply.headers.emplace_back("WWW-Authenticate", "Bearer");
  return reply;
}

HttpReply json_reply(const nlohmann::json& body) {
  return {.body = body.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)};
}

Answer::Answer(std::shared_ptr<HttpExchange> exchange, AnswerPlan plan, const ServedModel& model)
    : exchange_(std::move(exchange)),
      plan_(std::move(plan)),
      model_(model),
      choices_(plan_.prompts.size() * static_cast<std::size_t>(plan_.n)),
      left_(choices_.size()),
      unfinished_(choices_.size()) {
  for (const PreparedPrompt& p : plan_.prompts)
    usage_.prompt_tokens += static_cast<std::int64_t>(p.ids.size());
  usage_.routed_layers = model.routed_layers;
  exchange_->record().id = plan_.head.id;
  exchange_->record().prompt_tokens = usage_.prompt_tokens;
}

void Answer::updated(std::vector<TextUpdate> updates) {
  // Nobody sees a whole answer before its end, so no thread is woken for each token of it.
  if (!plan_.stream) {
    for (TextUpdate& update : updates) {
      if (update.finish != Finish::None) --unfinished_;
      held_.push_back(std::move(update));
    }
    if (unfinished_ > 0) return;
    updates = std::exchange(held_, {});
  }
  exchange_->post([self = shared_from_this(), updates = std::move(updates)]() mutable {
    for (TextUpdate& update : updates) self->take(std::move(update));
    if (self->left_ == 0) self->finish();
  });
}

void Answer::failed(const ApiError& error) {
  exchange_->post([self = shared_from_this(), error] { self->fail(error); });
}

void Answer::take(TextUpdate update) {
  Choice& c = choices_[update.text];
  c.prompt_logprobs.insert(c.prompt_logprobs.end(), update.prompt_logprobs.begin(),
                           update.prompt_logprobs.end());
  std::move(update.prompt_alternatives.begin(), update.prompt_alternatives.end(),
            std::back_inserter(c.prompt_alternatives));
  for (const std::vector<std::uint8_t>& token : update.kept) {
    std::string& layers = c.routing.kept.emplace_back();
    for (const std::uint8_t kept : token) layers += kept != 0 ? '1' : '0';
  }
  if (update.finish != Finish::None) {
    --left_;
    c.finish = update.finish;
    usage_.completion_tokens += update.tokens;
    // A prompt counts once, whatever n is.
    if (update.text % static_cast<std::size_t>(plan_.n) == 0) usage_.cached_tokens += update.cached_tokens;
    exchange_->record().completion_tokens = usage_.completion_tokens;
    exchange_->record().verifications += update.verifications;
    exchange_->record().verified_tokens += update.verified_tokens;
    const auto tokens =
        static_cast<double>(static_cast<std::int64_t>(prompt_of(update.text).ids.size()) + update.tokens);
    if (!update.routed_fraction.empty()) {
      usage_.routed_fraction.resize(update.routed_fraction.size());
      routed_tokens_ += tokens;
      for (std::size_t i = 0; i < update.routed_fraction.size(); ++i)
        usage_.routed_fraction[i] +=
            (update.routed_fraction[i] - usage_.routed_fraction[i]) * tokens / routed_tokens_;
    }
  }
  if (!plan_.stream) {
    c.text += update.piece.text;
    std::move(update.piece.tokens.begin(), update.piece.tokens.end(), std::back_inserter(c.tokens));
    return;
  }
  const bool says = !update.piece.text.empty() || (plan_.logprobs && !update.piece.tokens.empty()) ||
                    !c.routing.kept.empty();
  if (!says && update.finish == Finish::None) return;
  ChoicePart part{static_cast<std::int64_t>(update.text), std::move(update.piece.text),
                  std::move(update.piece.tokens), update.finish, !c.is_begun};
  if (plan_.echo) add_prompt(update.text, part);
  add_routing(c, part);
  c.is_begun = true;
  send(plan_.format->chunk(plan_.head, part, plan_.include_usage));
}

// With echo the prompt stands before the answer: its text and tokens in the first piece, and in all pieces
// offsets that count it.
void Answer::add_prompt(std::size_t index, ChoicePart& part) const {
  const PreparedPrompt& prompt = prompt_of(index);
  const Choice& c = choices_[index];
  const std::int64_t characters = count_characters(prompt.text);
  for (ShownToken& t : part.tokens) t.position += characters;
  if (!part.is_first) return;
  part.text.insert(0, prompt.text);
  if (!plan_.logprobs) return;
  AnswerText text(*model_.tokenizer, {}, {}, false);
  std::vector<ShownToken> tokens;
  const auto append = [&](Piece piece) {
    std::move(piece.tokens.begin(), piece.tokens.end(), std::back_inserter(tokens));
  };
  for (std::size_t i = 0; i < prompt.ids.size(); ++i) {
    const bool scored = i > 0 && i - 1 < c.prompt_logprobs.size();
    const bool has_top = i > 0 && i - 1 < c.prompt_alternatives.size();
    append(text.add({prompt.ids[i], scored ? c.prompt_logprobs[i - 1] : NAN},
                    has_top ? c.prompt_alternatives[i - 1] : std::vector<SampledToken>()));
  }
  append(text.rest());
  tokens.insert(tokens.end(), std::make_move_iterator(part.tokens.begin()),
                std::make_move_iterator(part.tokens.end()));
  part.tokens = std::move(tokens);
}

void Answer::add_routing(Choice& c, ChoicePart& part) const {
  if (!plan_.routing) return;
  const std::int64_t next = c.routing.first + static_cast<std::int64_t>(c.routing.kept.size());
  part.routing = std::exchange(c.routing, {next, {}, {}});
  part.routing->layers = model_.routed_layers;
}

void Answer::send(const std::string& json) {
  if (!is_begun_) {
    is_begun_ = true;
    exchange_->begin({.content_type = "text/event-stream; charset=utf-8",
                      .headers = {{"Cache-Control", "no-cache"}, {"X-Accel-Buffering", "no"}}});
  }
  exchange_->write(fmt::format("data: {}\n\n", json));
}

void Answer::finish() {
  if (plan_.stream) {
    if (plan_.include_usage) send(plan_.format->usage_chunk(plan_.head, usage_));
    send("[DONE]");
    return exchange_->end();
  }
  std::vector<ChoicePart> parts;
  for (std::size_t i = 0; i < choices_.size(); ++i) {
    Choice& c = choices_[i];
    ChoicePart part{static_cast<std::int64_t>(i), std::move(c.text), std::move(c.tokens), c.finish};
    if (plan_.echo) add_prompt(i, part);
    add_routing(c, part);
    parts.push_back(std::move(part));
  }
  exchange_->reply({.body = plan_.format->whole(plan_.head, parts, usage_)});
}

void Answer::fail(const ApiError& error) {
  exchange_->record().end = error.parts().code.empty() ? "failed" : error.parts().code;
  if (!is_begun_) return exchange_->reply(reply_of(error));
  send(error.json());
  send("[DONE]");
  exchange_->end();
}

}  // namespace fathom::serve
