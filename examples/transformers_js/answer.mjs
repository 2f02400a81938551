// Answers questions on pictures with transformers.js, offline: node answer.mjs JOB.json ANSWERS.json
// JOB: {folders, model, dtype, new_tokens, questions: [{image, messages}]}. ANSWERS: what went in and what came out.
import { readFileSync, writeFileSync } from "node:fs";
import { AutoModelForImageTextToText, AutoProcessor, env, RawImage } from "@huggingface/transformers";

const job = JSON.parse(readFileSync(process.argv[2], "utf8"));
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = job.folders;

const processor = await AutoProcessor.from_pretrained(job.model);
const model = await AutoModelForImageTextToText.from_pretrained(job.model, { dtype: job.dtype });
// Some of the client's processors take the picture first, others the text.
const pictureFirst = ["LlavaProcessor", "PaliGemmaProcessor", "PixtralProcessor"];
const kind = processor.image_processor.config.processor_class;

const answers = [];
for (const { image, messages } of job.questions) {
  const text = processor.tokenizer.config.chat_template
    ? processor.apply_chat_template(messages, { add_generation_prompt: true })
    : "<image>" + messages[0].content.at(-1).text;
  const picture = await RawImage.read(image);
  // A template may have written the token that the tokenizer would put before the text.
  const begin = processor.tokenizer.bos_token;
  const options = { add_special_tokens: !(begin && text.startsWith(begin)) };
  const inputs = pictureFirst.includes(kind)
    ? await processor(picture, text, options)
    : await processor(text, picture, options);
  const sequences = await model.generate({ ...inputs, max_new_tokens: job.new_tokens, do_sample: false });
  const length = inputs.input_ids.dims[1];
  answers.push({
    input_ids: inputs.input_ids.tolist()[0].map(Number),
    pixels: Buffer.from(inputs.pixel_values.data.buffer).toString("base64"),
    dims: inputs.pixel_values.dims,
    tokens: sequences.tolist()[0].slice(length).map(Number),
    text: processor.batch_decode(sequences.slice(null, [length, null]), { skip_special_tokens: true })[0],
  });
}
writeFileSync(process.argv[3], JSON.stringify(answers));
