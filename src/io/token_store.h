// Token stores: the training data, one file of Fathom's HDF5 kind "token store" (docs/formats.md).
//
// Tokens of all documents lie one after the other; an end-of-document token follows each. Equal input gives
// byte-identical stores: they hold no dates and no paths.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/io/tokenizer.h"

namespace fathom {

/// What describes a store besides its tokens.
struct TokenStoreInfo {
  std::string tokenizer_kind;         // "bytes", "sentencepiece", "bpe" or "external" (ids alone)
  std::string tokenizer_hash;         // Tokenizer::hash; "external:VOCAB:END" when unknown
  std::int64_t vocab_size = 0;        // ids are in [0, vocab_size)
  std::int32_t end_of_document = -1;  // -1: none
  std::int32_t bos = -1;              // -1: none
  std::string recipe;                 // how it was made, without paths: "split=train valid_fraction=0.05"
};

/// The description of stores that `tokenizer` makes.
TokenStoreInfo describe(const Tokenizer& tokenizer, std::string recipe);

/// Writes a store; complete after `commit`, absent without it. UserError when the disk refuses.
class TokenStoreWriter {
 public:
  TokenStoreWriter(const std::string& path, TokenStoreInfo info);
  ~TokenStoreWriter();
  TokenStoreWriter(TokenStoreWriter&&) noexcept;
  TokenStoreWriter& operator=(TokenStoreWriter&&) noexcept;

  /// One document: its tokens (end-of-document excluded: it is added here) and the text they came from.
  void add_document(std::span<const std::int32_t> tokens, std::string_view text);
  /// One document of unknown text, exactly as given (it is not empty).
  void add_tokens(std::span<const std::int32_t> tokens);

  std::int64_t num_tokens() const;
  std::int64_t num_documents() const;
  std::int64_t text_bytes() const;

  /// Writes everything but the store's name: only commit may follow. UserError when there is no token.
  void finish();
  /// finish, unless that is done, and puts the store in place.
  void commit();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Read access to a store. Any number of threads may read.
class TokenStore {
 public:
  struct Options {
    /// Stores whose tokens take at most this many bytes are held in memory; others are read from the file.
    std::int64_t memory_limit = std::int64_t{512} << 20;
  };

  /// Verifies the checksum, the shapes, the documents' offsets and every id. UserError says what is wrong.
  static TokenStore open(const std::string& path, const Options& options);
  static TokenStore open(const std::string& path) { return open(path, Options()); }
  ~TokenStore();
  TokenStore(TokenStore&&) noexcept;
  TokenStore& operator=(TokenStore&&) noexcept;

  /// Tokens offset, offset + 1, ... until `out` is full. The range must lie within [0, num_tokens).
  void read(std::int64_t offset, std::span<std::int32_t> out) const;

  const std::string& path() const;
  const TokenStoreInfo& info() const;
  std::int64_t num_tokens() const;
  std::int64_t num_documents() const;
  std::int64_t vocab_size() const { return info().vocab_size; }
  const std::string& tokenizer_hash() const { return info().tokenizer_hash; }
  bool is_bytes() const { return info().tokenizer_kind == "bytes"; }
  /// num_documents + 1 offsets: document i is [starts[i], starts[i + 1]), its end-of-document token included.
  std::span<const std::int64_t> document_starts() const;
  /// XXH3 of each document's text (of its ids in an external store).
  std::span<const std::uint64_t> document_hashes() const;
  /// Bytes of text behind all tokens, for bits per byte; 0 when unknown.
  std::int64_t text_bytes() const;
  /// Identifies the text of all documents: 32 hexadecimal digits.
  const std::string& source_hash() const;
  /// Identifies the file's content: 16 hexadecimal digits.
  std::string content_hash() const;

 private:
  struct Impl;
  explicit TokenStore(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// UserError when `store` was made with another tokenizer than `tokenizer`, which was loaded from
/// `tokenizer_path`.
void require_tokenizer(const TokenStore& store, const Tokenizer& tokenizer,
                       const std::string& tokenizer_path);

}  // namespace fathom
