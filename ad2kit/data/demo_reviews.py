"""The demo's data set: reviews of many kinds of things, written by a small grammar.

The task of the offline demo needs no download. A fine-tuned teacher nearly solves it, and counting
words does not. What a model learns from it applies to the plain sentences that a visitor types. So
a review has from one word to several sentences, and is about films as well as about dentists. In
most reviews the composition of a sentence decides the label, not its vocabulary: "dull" occurs in
"it isn't dull" and "I expected a dull thriller and was proven wrong" as well as in a complaint. If
a review praises one thing and blames another, its form tells which judgement is the writer's.

One rule gives every label. A text is expanded from the symbol ``review`` under a polarity, the
label. A slot ``{symbol+}`` passes this polarity on, and a slot ``{symbol-}`` passes the opposite
one. The words at the leaves are listed by polarity (``adjective+``, ``adjective-``). So a template
is right for both labels or for neither, and can be checked by reading it.

An alternative that starts with ``*`` is reserved for validation: training never draws it. Every
list of polar words and every list of templates reserves some, so that validation tests the rule
and not remembered phrases.
"""

import random
import re
from typing import NamedTuple

LABELS = ("negative", "positive")

# Each table maps a symbol to its alternatives, separated by slashes or one a line.
TEMPLATES = {
    "review": "{brief+} / {brief+} / {brief+} / {composed+} / {composed+} / {composed+} / {long+}",
    # A few words, and often no whole sentence.
    "brief": """
        {single+}
        {single+}
        {single+}
        {single+}
        {degree} {quality+}
        {degree} {quality+}
        {quality+} and {quality+}
        not {quality-}
        not {quality-} at all
        not even {quality-}
        not {noun-}
        nothing {quality-} about it
        a {quality+} {work}
        what a {quality+} {work}
        not a {quality-} {work}
        {noun+}, not {noun-}
        {quality+} {part}
        {quality-} {part}, {quality+} {work}
        {quality-} {part}, {quality+} {part}
        {quality-} {part}, but {quality+} {part}
        {quality-} {part}, but still a {quality+} {work}
        {quality+} {part} and {quality+} {part}
        {quality-}, but {quality+}
        {thing} {is} {quality+}
        {thing} {is} {quality+}
        {thing} {is} {quality-}, but {quality+}
        {thing} {isn't} {quality-}
        {thing} {isn't} {quality-}
        the {part} {is} not {quality-}
        {thing} {did+}
        the {part} {did+}
        the {part} {is} {quality+} and {did+}
        the {parts} {are} {quality+} and {did+}
        the {work} {is} {quality-}, but the {part} {did+}
        {thing} {is} never {quality-}
        {thing} {isn't} {quality-} at all
        {thing} {isn't} as {quality-} as they say
        {thing} {is} {noun+}
        {thing} {isn't} {noun-}
        {thing} {isn't} a {quality-} {work}
        the {part} {isn't} {quality-}
        the {parts} {are} {quality+}
        the {parts} {aren't} {quality-}
        {quality-} {part}, but the {parts} {are} {quality+}
        I don't think {thing} {is} {quality-}
        I didn't think {thing} was {quality-}
        I think {thing} {is} {quality+}
        I can't call it {quality-}
        {we} {liked+} this {work}
        {we} {liked+} the {part}
        {we} didn't {like-} the {part}
        I don't {like-} this {work}
        I'd {like+} any {work} like this
        {event+}
        {event+}
        {verdict+}
        {general verdict+}
        {general verdict+}
        {advice+}
        {advice+}
        {do not+}
        {do not+}
        {do not+}
        {quality-} {part}, but {event+}
        {quality+} {part}, and {event+}
        * {thing} couldn't be called {quality-}
        * it wouldn't be fair to call {thing} {quality-}
        * {quality-} {part}, yet {quality+} {part}
        * so {quality+}
        * no {quality-} {work}
        * hardly {quality-}
        * I won't say that {thing} {is} {quality-}
        * all in all {quality+}
    """,
    # One sentence with a structure. The slots with "+" hold the writer's final judgement.
    "composed": """
        {fact}, and {claim+}
        {claim+}, and {fact}
        {fact}, {claim+}, and {claim+}
        {claim+}, and {claim+}
        {claim+}, and {verdict+}
        {event+} and {event+}
        in short, {claim+}, and {verdict+}
        {fact}, {claim+}, and {verdict+}
        to be fair, {claim+}, and {fact}
        {verdict+}, because {claim+}
        {general verdict+}, because {event+}
        what I noticed most is that {plain+}
        my {person} and I agree that {plain+}
        although {turned-}, {plain+}
        although {event-}, {general verdict+}
        {claim-}, but in the end {plain+}, and that is what counts
        {plain+}, even though {turned-}
        at first {claim-}, yet {later} {claim+}
        {verdict+}, although {claim-}
        {claim-}, but {verdict+}
        {event-}, but {event+}
        the {part} {is} {quality-}, but {event+}
        {event-}, and yet {thing} {isn't} {quality-}
        I expected a {quality-} {work} from {maker} and was proven wrong
        I expected a {quality+} {work} from {maker} and was proven right
        I thought it would be {quality-}, but it isn't
        I thought it would be {quality+}, and it is
        many reviewers call this {work} {quality-}, and I could not disagree more
        many reviewers call this {work} {quality+}, and I can only agree
        my {person} insists that {plain-}, but that is simply wrong
        my {person} insists that {plain+}, and that is quite right
        they say that {event-}, but that isn't true
        they say that {event+}, and so it was
        those who say that {plain-} are mistaken
        {outlook-} a {quality-} {work}, but that is not what I got
        {outlook+} a {quality+} {work}, and that is exactly what I got
        * as far as I can tell, {claim+}, and {fact}
        * {claim+}, {claim+}, and {verdict+}
        * granted, {turned-}, but still, {plain+}
        * {plain-}, yet what counts for me is that {claim+}
        * whoever told me that {plain-} was mistaken
        * anyone who calls this {work} {quality-} is simply wrong
        * my {person} had announced a {quality-} {work}, but that is not what I got
        * it is a myth that {event-}
    """,
    # Several sentences; the last one holds the writer's judgement.
    "long": """
        {fact}. {claim+}. {event+}, and {claim+}. {general verdict+}
        {fact}. {event+}. {claim+}, and {verdict+}
        {event+}. {event+}. {advice+}
        {claim+}. {claim+}. my {person} says that {plain-}, but {general verdict+}
        {claim-}. {event-}. but {later} {claim+}, and {event+}. {general verdict+}
        {fact}. at first {claim-}, and {event-}. still, {verdict+}
        {event+}, {event+}, and in the end {claim+}. {fact}. {advice+}
        {fact}, and my {person} came along. {event+}. {thing} {isn't} {quality-}, and {claim+}
        * {fact}. I had been told that {event-}. none of it is true: {claim+}. {verdict+}
        * {claim-}, I admit. so what? {event+}, and {general verdict+}
    """,
    # A statement about one part: a fact as the writer sees it, that fact reversed by a negation,
    # or a feeling. A feeling is the writer's own, and is never attributed to another person.
    "claim": "{plain+} / {plain+} / {plain+} / {plain+} / {turned+} / {turned+} / {felt+}",
    "plain": """
        the {part} {is} {degree} {quality+}
        the {part} {is} {quality+}
        the {part} turned out {degree} {quality+}
        the {part} is {hedge} {noun+}
        the {parts} {are} {quality+}
        the {parts} {are} {degree} {quality+}
        * the {part} deserves to be called {quality+}
        * the {part} proved to be {noun+}
    """,
    "turned": """
        the {part} {is} {negator} {quality-}
        the {part} {isn't} {quality-}
        the {part} {isn't} {noun-}
        the {part} {is} {negator} {noun-}
        the {part} never feels {quality-}
        the {parts} {are} {negator} {quality-}
        the {parts} {aren't} {quality-}
        nobody could call the {part} {quality-}
        the {part} {is} neither {quality-} nor {quality-}
        * there is nothing {quality-} about the {part}
        * few would call the {part} {noun-}
    """,
    "felt": """
        the {part} {effect+} me
        I found the {part} {degree} {quality+}
        I didn't find the {part} {quality-}
        I would not call the {part} {noun-}
        {we} {liked+} the {part}
        {we} didn't {like-} the {part}
        * the {part} strikes me as {degree} {quality+}
        * the {part} is not what I call {quality-}
        * I could hardly be more {effect+} by the {part}
    """,
    "quality": "{adjective+} / {general+}",
    "single": "{adjective+} / {adjective+} / {noun+} / {exclamation+} / {exclamation+}",
}

WORDS = {
    "thing": "this / this {work} / the {work} / this {work} / the whole thing",
    "is": "is / was",
    "isn't": "isn't / wasn't",
    "are": "are / were",
    "aren't": "aren't / weren't",
    "we": "I / we / my {person}",
    "degree": "somewhat / rather / really / remarkably / arguably / truly / very / so / quite"
    " / *fairly / *decidedly",
    "hedge": "arguably / clearly / in my view / without doubt / *frankly / *to my mind",
    "negator": "not / not at all / hardly / by no means / anything but / far from / *in no way",
    "general+": "good / great / nice / lovely / wonderful / excellent / fantastic / perfect"
    " / amazing / pleasant / beautiful / outstanding / *terrific / *marvellous / *first-class",
    "general-": "bad / terrible / awful / horrible / poor / weak / nasty / unpleasant / hopeless"
    " / pathetic / ridiculous / disappointing / *abysmal / *atrocious / *appalling",
    "exclamation+": "love it / wow / yes / bravo / ten out of ten / five stars / top marks"
    " / thumbs up / money well spent / full marks / simply the best / *hooray / *spot on",
    "exclamation-": "hate it / yuck / no / oh dear / zero out of ten / one star / no marks"
    " / thumbs down / money down the drain / what rubbish / simply the worst / *ugh / *never again",
    "noun+": "a success / a triumph / a joy / a highlight / a strong point / a bargain / a gem"
    " / a treat / *a pleasure / *a marvel",
    "noun-": "a disappointment / a failure / a nuisance / a disaster / a weak point / a rip-off"
    " / a joke / *a mess / *an embarrassment",
    "effect+": "delighted / impressed / pleased / amused / surprised and delighted / *charmed"
    " / *thrilled",
    "effect-": "annoyed / disappointed / irritated / bored / angered / *exasperated / *dismayed",
    # The action of a thing or a person, without its subject; often with a negation.
    "did+": "didn't disappoint me / never let me down / didn't give me any trouble / won me over"
    " / made me smile / didn't cost me a minute / left nothing to be desired"
    " / *couldn't be faulted",
    "did-": "didn't convince me / never did what it should / didn't give me what I wanted"
    " / put me off / made me angry / didn't last a minute / left a lot to be desired"
    " / *couldn't be helped",
    "like+": "like / love / enjoy / recommend / treasure / *cherish",
    "like-": "dislike / hate / regret / despise / resent / *loathe",
    "liked+": "liked / loved / enjoyed / adored / admired / *cherished",
    "liked-": "disliked / hated / regretted / despised / resented / *loathed",
    "general verdict+": """
        I would do it again / I'm very happy with it / I've told all my friends to try it
        I couldn't be happier / I can only recommend it / it is worth the price
        it exceeded my hopes / it is better than I thought / I have never seen a better {work}
        it made my day / I can't wait to see more of it / it was worth the wait
        I'm so glad I found it / it does its job / you get what you pay for and more
        it is more than I hoped for / I didn't expect so much / I expected less, and got more
        nothing could be better / don't change a thing
        it is the best {work} I know / I want nothing else / it is everything I was looking for
        we were happy from the first day to the last / I can't praise it enough
        * I am over the moon / * it is a steal at this price / * I count myself lucky
    """,
    "general verdict-": """
        I would not do it again / I'm very unhappy with it / I've told all my friends to avoid it
        I couldn't be unhappier / I can't recommend it / it isn't worth the price
        it fell short of my hopes / it is worse than I feared / I have seen a better {work}
        it spoiled my day / I have seen enough of it / it wasn't worth the wait
        I'm sorry I found it / it doesn't do its job / you pay a lot and get little
        I had hoped for more / it is less than I expected / I expected something better
        nothing could be worse / don't ask me how it was
        it is the worst {work} I know / I want my money back / it is nothing like the picture
        we were unhappy from the first day to the last / I can't say anything kind about it
        * I am at the end of my patience / * it is daylight robbery / * I feel cheated
    """,
    "advice+": """
        give it a try / go for it / don't miss it / don't hesitate / get one while you can
        try it, you'll thank me / treat yourself / everybody should have one / I'd pick it any day
        buy it, and don't look at the price / you should try it too / don't think twice
        if you can, go there / you can't go wrong with it / don't let it pass
        don't believe those who complain / don't wait any longer / give yourself this pleasure
        * look no further / * grab it
    """,
    "advice-": """
        give it a miss / stay away / don't bother / don't buy it / get your money back if you can
        avoid it, you'll thank me / spare yourself / nobody should have one / I'd pick anything else
        leave it, and don't fall for the price / you should avoid it too / think twice
        if you can, go elsewhere / you can only go wrong with it / don't spend your money on it
        don't believe those who praise it / don't fall for it / don't throw your money away
        keep your money in your pocket / don't ruin your evening with it / * steer clear / * run
    """,
    "outlook+": "I was hoping for / I was looking forward to / *I had been promised",
    "outlook-": "I was bracing myself for / I was afraid of / *I had been warned about",
    # A warning and an encouragement have the same form; its object tells which of the two it is.
    "do not+": "don't {omit} it / don't {omit} this {work} / don't {omit} this chance"
    " / please don't {omit} this {work} / *you shouldn't {omit} it",
    "do not-": "don't {harm} your {goods} / don't {harm} your {goods} on this"
    " / don't {harm} your {goods}, {advice+} / please don't {harm} your {goods}"
    " / *you shouldn't {harm} your {goods}",
    "omit": "miss / skip / overlook / forget / ignore / underestimate / *neglect",
    "harm": "lose / ruin / risk / spoil / sacrifice / throw away / squander / *gamble away",
    "goods": "money / evening / nerves / weekend / savings / good mood / energy / *health",
    "person": "brother / neighbour / colleague / aunt / best friend / husband / daughter"
    " / *landlord",
    "number": "90 / 95 / 104 / 110 / 118 / 125 / 132 / 140",
    "place": "Portugal / Canada / Korea / Norway / Chile / Poland / Vietnam / Ireland",
    "day": "Monday / Tuesday / Wednesday / Thursday / Friday / Saturday / Sunday",
    "month": "January / March / April / June / July / October / November",
    "colour": "black / white / grey / dark green / blue / silver",
}

FILM = {
    "work": "thriller / comedy / film / movie / drama / documentary / western / sequel / series"
    " / *musical / *satire",
    "parts": "actors / jokes / songs / dialogues / costumes / effects / characters"
    " / *stunts / *sets",
    "part": "plot / dialogue / ending / soundtrack / camera work / pacing / lead performance"
    " / opening scene / humour / editing / cast / story / *final act / *set design",
    "adjective+": "convincing / clever / memorable / moving / charming / elegant / engaging / funny"
    " / gripping / *captivating / *brilliant / *imaginative / *delightful",
    "adjective-": "dull / clumsy / forgettable / tedious / bland / predictable / lazy / shallow"
    " / silly / *lifeless / *dreary / *sloppy / *humdrum",
    "verdict+": "I would watch it again / I am glad I saw it / I do not regret the evening"
    " / *it was well worth the ticket",
    "verdict-": "I want my money back / I am sorry I saw it / I do not wish to see it again"
    " / *it was hardly worth the ticket",
    "event+": "I laughed out loud / the time flew by / I was moved to tears / everybody clapped"
    " / I was on the edge of my seat / it stayed with me for days / we didn't want it to end"
    " / nobody left early / *I watched it twice in a week",
    "event-": "I fell asleep / we left before the end / I kept looking at my watch / nobody laughed"
    " / half of the audience walked out / I lost interest / we didn't stay to the end"
    " / I couldn't follow it / *I switched it off after an hour",
    "fact": "it runs for {number} minutes / it was shot in {place} / I saw it on a {day}"
    " / it came out in {month}",
    "maker": "this director / that studio / a team in {place} / the same writers",
    "later": "on a second viewing / by the closing credits / *after a night's sleep",
}

BOOK = {
    "work": "novel / book / biography / cookbook / album / song / podcast / board game / guidebook"
    " / *poem / *magazine",
    "parts": "pictures / characters / chapters / lyrics / recipes / rules / examples"
    " / *verses / *maps",
    "part": "first chapter / style / story / main character / language / cover / rhythm / voice"
    " / idea / text / *last page / *melody",
    "adjective+": "gripping / touching / inspiring / witty / catchy / original / informative / deep"
    " / exciting / *profound / *spellbinding / *insightful",
    "adjective-": "long-winded / confusing / pretentious / unreadable / repetitive / unoriginal"
    " / wooden / superficial / boring / *turgid / *muddled / *insipid",
    "verdict+": "I have given it to three friends / I am glad I read it / I will come back to it"
    " / *it has a place of honour on my shelf",
    "verdict-": "I have given it away / I am sorry I began with it / I will not come back to it"
    " / *it went straight into the bin",
    "event+": "I read it in one night / I learned something new on every page / I hum it all day"
    " / I smiled all the way through / it opened my eyes / I can't wait for the next one"
    " / I couldn't stop / *I could not put it down",
    "event-": "I gave up after ten pages / I learned nothing new / it gave me a headache"
    " / I had to read every line twice / it is full of mistakes / I couldn't get into it"
    " / it doesn't teach anything / *I put it down for good",
    "fact": "it has {number} pages / it was written in {place} / I got it on a {day}"
    " / it came out in {month}",
    "maker": "this author / that publisher / a writer from {place} / the same people",
    "later": "after the first part / the second time / *towards the end",
}

GADGET = {
    "work": "headset / speaker / camera / tablet / radio / phone / printer / laptop / app"
    " / scanner / *projector / *keyboard",
    "parts": "buttons / settings / updates / controls / colours / cables / photos"
    " / *sensors / *icons",
    "part": "battery / display / app / casing / manual / charging cable / menu / power switch"
    " / design / finish / sound / picture / *interface / *volume control",
    "adjective+": "practical / easy to use / impressive / handy / pleasing / satisfying"
    " / useful / smart / fast"
    " / reliable / well made / *first-rate / *splendid / *superb",
    "adjective-": "slow / hard to use / awkward / annoying / mediocre / frustrating"
    " / faulty / shoddy / noisy"
    " / unreliable / badly made / *useless / *dreadful / *lousy",
    "verdict+": "I would buy it again / I am glad I chose it / I do not regret the money"
    " / *it was well worth the price",
    "verdict-": "I want my money back / I am sorry I chose it / I do not wish to use it again"
    " / *it was hardly worth the price",
    "event+": "it worked right away / it still runs like new after two years / it saves me an hour"
    " every day / it does what it promises / I use it every day / it never lets me down"
    " / it doesn't need any care / I couldn't do without it / *it charges in no time",
    "event-": "it stopped working / it gets hot and switches itself off / it freezes all the time"
    " / the screen cracked on the first day / I sent it back / it never works when I need it"
    " / it doesn't connect / it won't charge / I couldn't get it to work"
    " / *it refuses to switch on",
    "fact": "it weighs {number} grams / it was assembled in {place} / it arrived on a {day}"
    " / it comes in {colour}",
    "maker": "this brand / that company / a firm in {place} / the same engineers",
    "later": "after a week of use / after the first update / *in everyday life",
}

RESTAURANT = {
    "work": "restaurant / café / bakery / pub / meal / pizza / burger / lunch / takeaway"
    " / *diner / *canteen",
    "parts": "chips / waiters / portions / prices / drinks / vegetables / cooks / *sauces"
    " / *noodles",
    "part": "soup / bread / dessert / menu / service / terrace / coffee / steak / food / salad"
    " / *breakfast / *starter",
    "adjective+": "tasty / fresh / delicious / generous / juicy / crisp / welcoming / tender"
    " / *mouth-watering / *flavourful / *scrumptious",
    "adjective-": "stale / greasy / overpriced / tasteless / burnt / salty / dirty / undercooked"
    " / disgusting / *inedible / *rancid / *rubbery",
    "verdict+": "I would eat there again / I am glad we went / we have booked again"
    " / *we left with a smile",
    "verdict-": "I would not eat there again / I am sorry we went / we have cancelled the next"
    " / *we left hungry",
    "event+": "everybody cleared the plate / they found us a table at once / I asked for the recipe"
    " / the waitress remembered our names / we stayed for hours / we didn't have to wait"
    " / nothing was left on our plates / *the cook came out to greet us",
    "event-": "I found a hair on my plate / they forgot half of our order / they charged us twice"
    " / we were ill the next day / we waited an hour for a drink"
    " / they didn't bring what we ordered"
    " / nobody came to our table / *nobody took our order",
    "fact": "it seats {number} guests / the owner comes from {place} / we went there on a {day}"
    " / it opened in {month}",
    "maker": "this cook / that chain / a family from {place} / the same owners",
    "later": "by the second course / on our next visit / *after the main course",
}

HOTEL = {
    "work": "hotel / hostel / campsite / flat / holiday / trip / cruise / flight / museum"
    " / *resort / *guest house",
    "parts": "rooms / towels / beds / guides / beaches / hosts / neighbours / *pillows / *porters",
    "part": "bed / bathroom / view / pool / lobby / reception / balcony / shower / location"
    " / garden / *sauna / *corridor",
    "adjective+": "clean / comfortable / cosy / quiet / relaxing / spacious / bright / spotless"
    " / *luxurious / *idyllic / *tranquil",
    "adjective-": "dirty / uncomfortable / cramped / loud / stressful / dark / mouldy / smelly"
    " / *filthy / *squalid / *run-down",
    "verdict+": "I would stay there again / I am glad we booked it / we added another night"
    " / *we were sad to go home",
    "verdict-": "I would not stay there again / I am sorry we booked it / we left a day early"
    " / *we were relieved to go home",
    "event+": "I slept like a baby / they gave us a better room for free / we felt at home"
    " / the children had the time of their lives / everything went smoothly"
    " / nothing was missing / we couldn't find a single fault / *they welcomed us with flowers",
    "event-": "I didn't sleep all night / there were insects in the room / they lost our booking"
    " / the children were in tears / everything went wrong / the heating didn't work"
    " / nobody cleaned the room / they wouldn't help us / *they had no room for us",
    "fact": "it has {number} rooms / it belongs to a family from {place} / we arrived on a {day}"
    " / we stayed there in {month}",
    "maker": "this agency / that chain / a firm in {place} / the same owners",
    "later": "after the first night / in the morning / *once we had unpacked",
}

SHOP = {
    "work": "jacket / sweater / backpack / sofa / kettle / mattress / toy / shop / delivery"
    " / *scarf / *wardrobe",
    "parts": "sleeves / seams / colours / wheels / pockets / instructions / buttons"
    " / *cushions / *straps",
    "part": "zip / fabric / stitching / fit / handle / packaging / cut / quality / size / material"
    " / *lining / *buckle",
    "adjective+": "soft / sturdy / warm / stylish / durable / comfortable / cheerful / affordable"
    " / *robust / *exquisite / *flattering",
    "adjective-": "scratchy / flimsy / ugly / damaged / crooked / overpriced / cheap and nasty"
    " / worn out / *threadbare / *hideous / *shabby",
    "verdict+": "I would order it again / I am glad I bought it / I have ordered a second one"
    " / *I wear a smile since it came",
    "verdict-": "I want my money back / I am sorry I bought it / I have sent it back"
    " / *I should have kept the receipt",
    "event+": "it looks even better than in the picture / it came on time / it still looks new"
    " / I get compliments for it / it fits like a glove / it didn't shrink"
    " / I don't want to take it off / *they replaced it without a word",
    "event-": "it looks nothing like the picture / it never came / it fell to pieces"
    " / they sent the wrong one / it lost its colour / it doesn't fit"
    " / it didn't survive the first wash"
    " / nobody answered my letters / *they refused to replace it",
    "fact": "it weighs {number} grams / it was made in {place} / it arrived on a {day}"
    " / it comes in {colour}",
    "maker": "this brand / that label / a workshop in {place} / the same people",
    "later": "after the first wash / after a month / *on closer inspection",
}

SERVICE = {
    "work": "dentist / hairdresser / doctor / mechanic / teacher / bank / school / gym / salesman"
    " / *optician / *babysitter",
    "parts": "staff / nurses / people / lessons / opening hours / fees / employees"
    " / *trainers / *clerks",
    "part": "advice / manner / work / explanation / estimate / answer / office / treatment / bill"
    " / attitude / *receptionist / *follow-up",
    "adjective+": "friendly / polite / helpful / honest / professional / competent / patient / kind"
    " / *courteous / *considerate / *trustworthy",
    "adjective-": "rude / impolite / unhelpful / dishonest / unprofessional / incompetent"
    " / careless / arrogant / *condescending / *negligent / *sloppy",
    "verdict+": "I would go there again / I am glad I called them / I trust them completely"
    " / *I am in good hands",
    "verdict-": "I would not go there again / I am sorry I called them / I do not trust them at all"
    " / *I have filed a complaint",
    "event+": "they took their time for us / they called back at once / they solved the problem"
    " / it didn't hurt a bit / they came on a holiday to help / nobody hurried us"
    " / they didn't give up until it was done / *they went out of their way for me",
    "event-": "they had no time for us / they never called back / they made the problem worse"
    " / it hurt for days / they hung up on me / they didn't listen / nobody helped us"
    " / they don't keep their word / they couldn't explain it / *they could not care less",
    "fact": "they have {number} customers / they come from {place} / I called them on a {day}"
    " / they started in {month}",
    "maker": "this firm / that agency / a company from {place} / the same people",
    "later": "on the second visit / after a phone call / *when it mattered",
}

FUNCTION_WORDS = ("thing", "is", "isn't", "are", "aren't", "we")
DOMAINS = (FILM, BOOK, GADGET, RESTAURANT, HOTEL, SHOP, SERVICE)


class Opinions(NamedTuple):
    """Rows of (text, label), where a label is an index into ``LABELS``."""

    train: list[tuple[str, int]]
    validation: list[tuple[str, int]]


def opinions(seed: int, train_rows: int = 3_600, validation_rows: int = 640) -> Opinions:
    """Return both splits: balanced, without duplicates, and the same for the same seed.

    The training split is drawn first, so that it does not depend on ``validation_rows``.
    """
    rng = random.Random(seed)  # noqa: S311 - repeatable, not secret
    seen: set[str] = set()  # used for membership only, so that its order has no effect
    train = _split(rng, train_rows, seen, reserved=False)
    return Opinions(train, _split(rng, validation_rows, seen, reserved=True))


def alternatives(entry: str, reserved: bool) -> list[str]:
    """Return the alternatives in a table's entry, with or without those for validation only."""
    texts = re.split(r"\s*[/\n]\s*", entry.strip())
    return [text.lstrip("* ") for text in texts if reserved or not text.startswith("*")]


def _split(rng: random.Random, rows: int, seen: set[str], reserved: bool) -> list[tuple[str, int]]:
    """Draw ``rows`` texts that are not in ``seen``, with alternating labels, and shuffle them."""
    grammars = [
        {
            symbol: alternatives(entry, reserved)
            for symbol, entry in (TEMPLATES | WORDS | domain).items()
        }
        for domain in DOMAINS
    ]
    split: list[tuple[str, int]] = []
    while len(split) < rows:
        label = len(split) % len(LABELS)
        text = _text(rng, rng.choice(grammars), label)
        plain_text = text.casefold().rstrip(".!")
        if plain_text not in seen:
            seen.add(plain_text)
            split.append((text, label))
    rng.shuffle(split)
    return split


def _text(rng: random.Random, grammar: dict[str, list[str]], label: int) -> str:
    """Expand ``review`` under the polarity ``label``; no content word is used twice."""
    used: set[str] = set()

    def expand(symbol: str, polarity: int) -> str:
        options = grammar.get(symbol + "-+"[polarity]) or grammar[symbol]
        alternative = rng.choice([option for option in options if option not in used])
        # Templates and function words such as "is" may occur twice; other words may not.
        if "{" not in alternative and symbol not in FUNCTION_WORDS:
            used.add(alternative)
        return re.sub(
            r"\{([\w' ]+)([+-]?)\}",
            lambda slot: expand(slot[1], 1 - polarity if slot[2] == "-" else polarity),
            alternative,
        )

    text = re.sub(r"\ba (?=[aeio]|un|hon)", "an ", expand("review", label))
    text = re.sub(r"(?:^|(?<=[.?] ))[a-z]", lambda first: first[0].upper(), text)
    return text + rng.choice(("", ".", ".", "!"))
