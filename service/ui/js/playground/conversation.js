// What has been said so far, as the next request brings it.

/** The exchanges of a chat. One whose answer was blocked, or never came, is left out of what follows. */
export class Conversation {
  constructor(past = []) {
    this.past = past; // messages that came with a link
    this.turns = [];
  }

  /** The messages before a new one. */
  get messages() {
    return this.past.concat(...this.turns.map((turn) => {
      const { answer } = turn;
      return answer === null ? [] : [turn.request.messages.at(-1), { role: "assistant", content: answer }];
    }));
  }

  /** Whether there is something before the next message. */
  get begun() {
    return this.messages.length > 0;
  }

  /** A turn has been sent. again: it takes the place of the last one. */
  add(turn, again) {
    if (again) this.turns.pop();
    this.turns.push(turn);
  }
}
