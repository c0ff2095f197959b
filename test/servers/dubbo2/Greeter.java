package demo.api;

/** The service of every provider. */
public interface Greeter {
    /** Answers with the provider's id and the name. */
    String greet(String name);
}
