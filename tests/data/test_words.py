"""Words are equal for all forms in which people store a text, and a run of them is as long in any script."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mates_hf.data.overlap import NGRAM_WORDS, NgramIndex, hash_ngrams
from mates_hf.data.words import WORD, readings_of, weight_of, words_of

# Article 1 of the Universal Declaration of Human Rights, as the United Nations publish it; 30 words in English.
ARTICLES = {
    "english": "All human beings are born free and equal in dignity and rights. They are endowed with reason and "
    "conscience and should act towards one another in a spirit of brotherhood.",
    "chinese": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "japanese": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。人間は、理性と"
    "良心とを授けられており、互いに同胞の精神をもって行動しなければならない。",
    "korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 "
    "부여받았으며 서로 형제애의 정신으로 행동하여야 한다.",
    "thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรม "
    "และควรปฏิบัติต่อกันด้วยเจตนารมณ์แห่งภราดรภาพ",
    "lao": "ມະນຸດທຸກຄົນເກີດມາມີກຽດສັກສີ, ສິດທິ, ເສລີພາບແລະຄວາມສະເໝີພາບເທົ່າທຽມກັນ. ທຸກໆຄົນມີເຫດຜົນແລະຄວາມຄິດ"
    "ຄວາມເຫັນສ່ວນຕົວຂອງໃຜຂອງມັນ, ແຕ່ວ່າມະນຸດທຸກໆຄົນຄວນປະພຶດຕໍ່ກັນຄືກັນກັບເປັນອ້າຍນ້ອງກັນ.",
    "khmer": "មនុស្សទាំងអស់ កើតមកមានសេរីភាព និងសមភាព ក្នុងផ្នែកសេចក្ដីថ្លៃថ្នូរនិងសិទ្ធិ។ មនុស្ស "
    "មានវិចារណញ្ញាណនិងសតិសម្បជញ្ញៈជាប់ពីកំណើត ហើយគប្បីប្រព្រឹត្ដចំពោះគ្នាទៅវិញទៅមក ក្នុងស្មារតីភាតរភាពជាបងប្អូន។",
    "burmese": "လူတိုင်းသည် တူညီ လွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့် လည်းကောင်း၊ တူညီလွတ်လပ်သော အခွင့်အရေးများဖြင့် "
    "လည်းကောင်း၊ မွေးဖွားလာသူများ ဖြစ်သည်။ ထိုသူတို့၌ ပိုင်းခြား ဝေဖန်တတ်သော ဉာဏ်နှင့် ကျင့်ဝတ် သိတတ်သော "
    "စိတ်တို့ရှိကြ၍ ထိုသူတို့သည် အချင်းချင်း မေတ္တာထား၍ ဆက်ဆံကျင့်သုံးသင့်၏။",
    "tibetan": "འགྲོ་བ་མིའི་རིགས་རྒྱུད་ཡོངས་ལ་སྐྱེས་ཙམ་ཉིད་ནས་ཆེ་མཐོངས་དང༌། ཐོབ་ཐངགི་རང་དབང་འདྲ་མཉམ་དུ་ཡོད་ལ། ཁོང་ཚོར་རང་བྱུང་གི་"
    "བློ་རྩལ་དང་བསམ་ཚུལ་བཟང་པོ་འདོན་པའི་འོས་བབས་ཀྱང་ཡོད། དེ་བཞིན་ཕན་ཚུན་གཅིག་གིས་གཅིག་ལ་བུ་སྤུན་གྱི་འདུ་ཤེས་འཛིན་པའི་བྱ་སྤྱོད་ཀྱང་"
    "ལག་ལེན་བསྟར་དགོས་པ་ཡིན༎",
    "vietnamese": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền. Mọi con người đều được "
    "tạo hoá ban cho lý trí và lương tâm và cần phải đối xử với nhau trong tình bằng hữu.",
    "hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। उन्हें बुद्धि और अन्तरात्मा की "
    "देन प्राप्त है और परस्पर उन्हें भाईचारे के भाव से बर्ताव करना चाहिए।",
}

FORMS = {
    "case": ("Straße HEISST", "STRASSE heißt"),
    "composed": ("café naïve Ångström", unicodedata.normalize("NFD", "café naïve Ångström")),
    "without accents": ("el niño cantó aquí", "el nino canto aqui"),
    "full width": ("Ｈｅｌｌｏ　ｗｏｒｌｄ ２０２４", "Hello world 2024"),
    "half-width kana": ("ｶﾞｸｾｲﾊﾟﾝ", "ガクセイパン"),
    "kana decomposed": (unicodedata.normalize("NFD", "がぎぐ"), "がぎぐ"),
    "Hangul decomposed": (unicodedata.normalize("NFD", "대한민국의 각 나라"), "대한민국의 각 나라"),
    "Hangul spaced another way": ("할 수 있는 것이다", "할수있는것이다"),
    "Vietnamese, marks stacked": ("Việt Nam được hoà bình", unicodedata.normalize("NFD", "Việt Nam được hòa bình")),
    "Vietnamese, marks in another order": ("Vie\u0302\u0323t", "Vie\u0323\u0302t"),
    "Thai sara am": ("น้ำทำ", "น้ํ\u0e32ท\u0e4d\u0e32"),
    "Thai sara am, tone behind": ("น้ำ", "น\u0e4d\u0e49\u0e32"),
    "Thai, two signs for one": ("แม่", "เเม่"),
    "Lao sara am": ("\u0e99\u0ec9\u0eb3", "\u0e99\u0ecd\u0ec9\u0eb2"),
    "Arabic vowels and tatweel": ("كِتَابٌ جَمِيل", "كتـــاب جميل"),
    "Arabic presentation forms": ("\ufedb\ufe98\ufe8e\ufe91", "كتاب"),
    "Arabic alef with hamza": ("أحمد إلى آخر", "احمد الى اخر"),
    "Arabic and Persian letters": ("\u06a9\u062a\u0627\u0628\u06cc", "\u0643\u062a\u0627\u0628\u064a"),
    "Persian joined": ("می\u200cشود", "میشود"),
    "digits": ("١٢٣ ۱۲۳ १२३ ๑๒๓ ①", "123 123 123 123 1"),
    "Hebrew points": ("שָׁלוֹם עוֹלָם", "שלום עולם"),
    "Devanagari nukta": ("ज़रूर क़लम", "जरूर कलम"),
    "Devanagari joiners": ("क्\u200dष", "क्ष"),
    "Bengali vowel decomposed": ("\u0995\u09cb", "\u0995\u09c7\u09be"),
    "Turkish": ("İSTANBUL KAPISI", "istanbul kapısı"),
    "Greek": ("ΟΔΥΣΣΕΎΣ ΚΑΛΗΜΕΡΑ", "οδυσσεύς καλημέρα"),
    "Cyrillic": ("ЁЛКА Й", "ёлка й"),
    "Cyrillic io": ("ещё", "еще"),
    "apostrophes": ("don’t об’єкт ʻokina", "don't обʼєкт 'okina"),
    "hyphens and dashes": ("well‐known — so", "well-known - so"),
    "spaces": ("one\u00a0two\u2009three\u3000four", "one two three four"),
    "soft hyphen": ("con\u00adtam\u00adination", "contamination"),
    "zero width": ("con\u200btam\u2060ina\ufefftion", "contamination"),
    "byte order mark": ("\ufeffStart here", "start here"),
    "bidi marks": ("\u200fשלום\u200e \u202babc\u202c", "שלום abc"),
    "ligatures": ("ﬁne ﬂow oﬃce", "fine flow office"),
    "superscripts": ("x² + H₂O", "x2 + h2o"),
    "HTML entities": ("don&#39;t caf&eacute;&nbsp;&amp; tea &#x4E2D;", "don't café & tea 中"),
    "variation selectors": ("辻\ufe00葛\U000e0100", "辻葛"),
    "compatibility ideographs": ("\uf900\u2f00", "\u8c48\u4e00"),
    "Tibetan joint mark": ("བོད\u0f0cཡིག", "བོད་ཡིག"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_text_has_the_same_words(name) -> None:
    first, second = FORMS[name]
    assert words_of(first) == words_of(second)
    assert words_of(first)


@pytest.mark.parametrize(
    ("first", "second"),
    [("か", "が"), ("की", "का"), ("क", "कि"), ("กา", "กี"), ("ก่า", "ก้า"), ("ស", "សា"), ("各", "格"), ("한", "하")],
)
def test_what_is_another_word_stays_another_word(first, second) -> None:
    assert words_of(first) != words_of(second)


def test_a_word_is_not_broken_at_its_signs() -> None:
    assert words_of("हिन्दी भाषा") == ["हिन्दी", "भाषा"]
    assert words_of("தமிழ் மொழி") == ["தமிழ்", "மொழி"]
    assert words_of("น้ําตก 2 AI技術") == ["น้ํ", "า", "ต", "ก", "2", "ai", "技", "術"]


@pytest.mark.parametrize("language", ARTICLES)
def test_one_article_is_about_as_many_words_in_every_language(language) -> None:
    weight = sum(map(weight_of, words_of(ARTICLES[language]))) / WORD
    assert 0.8 * 30 <= weight <= 1.5 * 30
    hashes, _ = hash_ngrams([ARTICLES[language]], NGRAM_WORDS)
    assert len(hashes) >= NGRAM_WORDS


@pytest.mark.parametrize(
    ("alphabet", "letters"), [("的一是不了在人有我他这中大来上", 20), ("あいうえおかきくけこ", 26),
                              ("가나다라마바사아자차", 26), ("กขคงจฉชซ", 39), ("ကခဂဃ", 39), ("កខគឃ", 39)],
)  # fmt: skip
def test_a_run_of_letters_must_be_as_long_as_documented(alphabet, letters) -> None:
    text = "".join(alphabet[(i * i + i // 7) % len(alphabet)] for i in range(letters))
    index = NgramIndex([f"Start. {text} End."])
    assert index.shared([text, f"xx{text}yy", text[:-1], text[1:]]).tolist() == [0, 1]
    assert NgramIndex([text[:-1]]).num_short == 1


@given(st.text(st.characters(max_codepoint=127, exclude_characters="&"), max_size=60))
@settings(max_examples=200, deadline=None)
def test_english_is_read_as_before(text) -> None:
    assert words_of(text) == re.findall(r"\w+", text.lower())


@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_normal_forms_make_no_difference_in_any_text(text) -> None:
    wanted = words_of(text)
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert words_of(unicodedata.normalize(form, text)) == wanted
    assert all(weight_of(word) in range(1, WORD + 1) for word in wanted)


def test_words_broken_at_a_line_are_read_both_ways() -> None:
    broken = "this contam-\n  ination is well-\r\nknown, 3-\n4"
    assert readings_of(broken) == [
        ["this", "contam", "ination", "is", "well", "known", "3", "4"],
        ["this", "contamination", "is", "wellknown", "3", "4"],
    ]
    words = "one two three four five six seven eight nine ten eleven twelve".split()
    index = NgramIndex([" ".join([*words[:6], "contamination", *words[6:]])])
    assert index.shared([" ".join([*words[:6], "contam-\nination", *words[6:]])]).tolist() == [0]
    hyphened = NgramIndex([" ".join([*words[:6], "well-known", *words[6:]])])
    assert hyphened.shared([" ".join([*words[:6], "well-\nknown", *words[6:]])]).tolist() == [0]
    # The two readings of one text are no text of their own.
    assert NgramIndex(["a b cd a"], n=4).shared(["c-\nd a b"]).tolist() == []
