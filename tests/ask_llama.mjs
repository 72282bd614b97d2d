// Greedy answers of a GGUF file in llama.cpp, one JSON list: node ask_llama.mjs FOLDER_OF_NODE_LLAMA_CPP MODEL.gguf PROMPTS.json
import fs from "node:fs";
import {pathToFileURL} from "node:url";

const [folder, file, prompts] = process.argv.slice(2);
const {getLlama, LlamaCompletion} = await import(pathToFileURL(`${folder}/node_modules/node-llama-cpp/dist/index.js`).href);
const llama = await getLlama({gpu: false, maxThreads: 1, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: 512, threads: 1});
const completion = new LlamaCompletion({contextSequence: context.getSequence()});
const answers = [];
for (const prompt of JSON.parse(fs.readFileSync(prompts)))
    answers.push(await completion.generateCompletion(prompt, {maxTokens: 8, temperature: 0}));
console.log(JSON.stringify(answers));
