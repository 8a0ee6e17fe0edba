#include "vmstate/state_check.h"

#include <gtest/gtest.h>

#include "mapped_fixture.h"
#include "stream_fixture.h"

namespace qvmstate::vmstate {
namespace {

using qcow2::FindingKind;
using test::Blob;
using test::page;
using test::Touch;

Blob legacy_stream() {
  test::FakeRam ram(true);
  std::vector<Touch> pages(600, Touch::data);
  std::fill_n(pages.begin() + 100, 200, Touch::zero);
  ram.add_block("a.ram", pages, 1);
  ram.add_block("rom", std::vector(3, Touch::untouched), 2);
  return test::write_stream(ram, {"pc-test", {}, page}, {}).bytes;
}

StateChecksum checksum_of(const Blob &stream) {
  StreamDigest digest;
  digest.add(stream);
  return digest.finish();
}

struct Outcome {
  Result<StateCheck> check;
  qcow2::Findings findings;
};

Outcome run(const Blob &bytes, const std::optional<StateChecksum> &expected) {
  Outcome outcome;
  outcome.check = check_state(
      [&]() -> Result<std::unique_ptr<StreamSource>> {
        return std::make_unique<test::BlobSource>(bytes);
      },
      expected, "state", outcome.findings);
  return outcome;
}

TEST(StateCheck, WholeStreamsAreFoundWhole) {
  test::MappedStream mapped;
  mapped.blocks = {{"a.ram", test::page_fills(600)}, {"rom", test::page_fills(3)}};
  for (Blob stream : {legacy_stream(), mapped.build()}) {
    const StateChecksum checksum = checksum_of(stream);
    stream.resize(stream.size() + 70000, std::byte{0x77});  // what follows it is not of it
    Outcome outcome = run(stream, checksum);
    ASSERT_TRUE(outcome.check);
    EXPECT_TRUE(outcome.findings.list().empty());
    ASSERT_TRUE(outcome.check->stream);
    EXPECT_EQ(outcome.check->stream->stream_bytes, checksum.stream_bytes);
    EXPECT_EQ(outcome.check->checksum, ChecksumResult::right);
    outcome = run(stream, {});
    EXPECT_TRUE(outcome.findings.list().empty());
    EXPECT_EQ(outcome.check->checksum, ChecksumResult::none);
  }
}

TEST(StateCheck, EveryByteCounts) {
  test::MappedStream mapped;
  mapped.blocks = {{"a.ram", test::page_fills(600)}};
  for (const Blob &good : {legacy_stream(), mapped.build()}) {
    const StateChecksum checksum = checksum_of(good);
    for (size_t at = 5; at < good.size(); at += good.size() / 23) {
      Blob stream = good;
      stream[at] ^= std::byte{0x10};
      const Outcome outcome = run(stream, checksum);
      ASSERT_TRUE(outcome.check) << at;
      EXPECT_EQ(outcome.check->checksum, ChecksumResult::wrong) << at;
      EXPECT_GE(outcome.findings.count(FindingKind::damage), 1U) << at;
    }
  }
}

TEST(StateCheck, ShorterStreamsAreDamaged) {
  const Blob good = legacy_stream();
  for (const size_t bytes : {size_t{3}, size_t{2000}, good.size() / 2, good.size() - 400}) {
    const Outcome outcome = run({good.begin(), good.begin() + static_cast<ptrdiff_t>(bytes)}, {});
    ASSERT_TRUE(outcome.check);
    EXPECT_FALSE(outcome.check->stream) << bytes;
    EXPECT_EQ(outcome.findings.count(FindingKind::damage), 1U) << bytes;
    EXPECT_EQ(outcome.findings.list()[0].message.rfind("state: ", 0), 0U);
  }
}

TEST(StateCheck, PagesWithoutARecordAreTold) {
  test::Bytes stream;
  stream.u32(0x5145564d).u32(3);   // file header
  stream.u8(7).u32(2).text("pc");  // configuration
  stream.u8(1).u32(2).u8(3).text("ram").u32(0).u32(4);
  stream.u64(4 * page | 4).u8(1).text("m").u64(4 * page);
  stream.u64(0 * page | 2).u8(1).text("m").u8(0);  // page 0 zero
  stream.u64(2 * page | 2 | 0x20).u8(0);           // page 2 zero
  stream.u64(2 * page | 8 | 0x20).fill(page, 1);   // and again, with data
  stream.u64(0x10).u8(0x7e).u32(2).u8(0);
  const Outcome outcome = run(stream.done(), {});
  ASSERT_TRUE(outcome.check);
  ASSERT_EQ(outcome.findings.list().size(), 1U);
  EXPECT_EQ(outcome.findings.list()[0].kind, FindingKind::damage);
  EXPECT_NE(outcome.findings.list()[0].message.find("'m': 2 pages have no record"),
            std::string::npos);
}

TEST(StateCheck, PagesOfASizeThatIsFoundOut) {
  for (const uint64_t page_bytes : {1024U, 8192U}) {
    for (const uint64_t left_out : {uint64_t{0}, uint64_t{1}}) {
      const uint64_t pages = 4 * mib / page_bytes;
      test::Bytes stream;
      stream.u32(0x5145564d).u32(3);      // file header
      stream.u8(7).u32(5).text("sun4u");  // configuration
      stream.u8(1).u32(2).u8(3).text("ram").u32(0).u32(4);
      stream.u64(4 * mib | 4).u8(1).text("m").u64(4 * mib);
      for (uint64_t i = left_out; i < pages; ++i) {
        stream.u64(i * page_bytes | 8).u8(1).text("m").fill(page_bytes, 1);
      }
      stream.u64(0x10).u8(0x7e).u32(2).u8(0);
      const Outcome outcome = run(stream.done(), {});
      ASSERT_TRUE(outcome.check);
      EXPECT_EQ(outcome.findings.list().size(), left_out) << page_bytes;
      for (const qcow2::Finding &finding : outcome.findings.list()) {
        EXPECT_NE(finding.message.find("'m': 1 pages have no record"), std::string::npos);
      }
    }
  }
}

}  // namespace
}  // namespace qvmstate::vmstate
